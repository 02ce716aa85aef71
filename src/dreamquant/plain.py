"""What a program around the package may have set in torch, set aside while the package works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """float32 by default, with gradients and outside `torch.inference_mode`, whatever the caller has chosen; then as it was."""
    default = torch.get_default_dtype()
    try:
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if default != torch.float32:
            torch.set_default_dtype(default)
