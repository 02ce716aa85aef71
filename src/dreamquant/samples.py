"""`Samples`: images that a network was calibrated, or is to be compared, on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreamquant.errors import DataError
from dreamquant.mapped import in_parts

REAL = "images"  # the method of samples that were given, not made


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W), float32, in the network's input space; `labels` (N,) where they were made for classes.

    `confidence` (N,) is the probability that the network gives to its own first choice; None where nobody asked it. `losses`
    is the objective's value at each step (empty if nothing was optimised); `method`, `seed` and `options` say how to make them
    again. All lie in the processor's memory, and images there as they are counted, however they were made, so that those that a
    file gives back are run by the same kernels, to the same bits.
    """

    images: Tensor
    labels: Tensor | None = None
    method: str = ""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        given: object = self.images
        if not isinstance(given, Tensor):
            raise DataError(f"samples are a {type(given).__name__}, not a float32 tensor (N, C, H, W)")
        object.__setattr__(self, "images", in_order(given.detach().cpu() if given.requires_grad else given.cpu()))
        for name in ("labels", "confidence"):
            known: object = getattr(self, name)
            if known is not None and not isinstance(known, Tensor):
                raise DataError(f"{name} of samples are a {type(known).__name__}, not a tensor of as many numbers as images")
            object.__setattr__(self, name, None if known is None else known.cpu())

    @property
    def real(self) -> bool:
        """Whether all of them are images of what the network will see, as far as the user says so."""
        return self.method == REAL

    def __len__(self) -> int:
        return len(self.images)

    def check(self, input_shape: tuple[int, ...]) -> None:
        """`DataError` unless these are images, at least one, of finite float32 numbers, for a network of (C, H, W)."""
        images = self.images
        wanted = f"the network takes (N, {', '.join(map(str, input_shape))})"
        if tuple(images.shape[1:]) != tuple(input_shape) or images.dim() == 0 or not len(images):
            raise DataError(f"samples are {tuple(images.shape)}; {wanted}")
        if images.dtype != torch.float32:
            raise DataError(f"samples are {str(images.dtype).removeprefix('torch.')}; {wanted} in float32")
        if not are_finite(images):
            raise DataError("samples have values that are NaN or infinite")


def joined(one: Samples, other: Samples) -> Samples:
    """Two sets of images as one, which has labels where both have."""
    labels = None if one.labels is None or other.labels is None else torch.cat([one.labels, other.labels])
    method = f"{one.method} and {other.method}"
    return Samples(torch.cat([one.images, other.images]), labels, method, one.seed, {**other.options, **one.options})


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Every other sample, and the rest; a single one twice."""
    first, second = (replace(samples, images=samples.images[start::2], labels=None, confidence=None) for start in (0, 1))
    return first, second if len(second) else first


def in_order(tensor: Tensor) -> Tensor:
    """The tensor, its elements in memory in the order that they are counted in; images may lie apart."""
    plain = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride()[1:] == plain[1:] else tensor.clone(memory_format=torch.contiguous_format)


def are_finite(images: Tensor) -> bool:
    """Whether all numbers are, looked at a few images at a time."""
    return all(bool(part.isfinite().all()) for (part,) in in_parts(images))
