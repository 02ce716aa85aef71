"""What a program around the package may have set in torch, set aside while the package works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """float32 by default and in all its digits, with gradients and outside `torch.inference_mode`, whatever the caller has
    chosen; then as it was.

    A GPU's convolutions would otherwise round what they multiply to the ten bits of TF32, a hundred times as far from the
    processor's answers as float32 is.
    """
    default = torch.get_default_dtype()
    try:
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad(), _whole_float32():
            yield
    finally:
        if default != torch.float32:
            torch.set_default_dtype(default)


@contextmanager
def _whole_float32() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    known = torch.backends.cudnn
    with known.flags(enabled=known.enabled, benchmark=known.benchmark, deterministic=True, allow_tf32=False):
        yield
