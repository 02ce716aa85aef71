"""What is written into a part of a tensor, as operations that make a new one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    """All of `x` written over."""
    return source.to(x.dtype) if source.shape == x.shape else source.to(x.dtype).expand(x.shape)


def slice_scatter(
    x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """`x[start:end:step] = part` along an axis: what is left and the part, side by side or, with a step, one in the other."""
    if start in (None, 0) and (end is None or end == sys.maxsize) and step == 1:
        return part
    size = x.shape[dim]
    end = size if end is None else end
    first, last = (min(max(place + size if place < 0 else place, 0), size) for place in (start or 0, end))
    if step == 1:
        before = [x.narrow(dim, 0, first)] if first else []
        behind = [x.narrow(dim, last, size - last)] if last < size else []
        return torch.cat([*before, part, *behind], dim)
    places = torch.arange(size, device=x.device)
    source = ((places - first) // step).clamp(0, part.shape[dim] - 1)
    written = (places >= first) & (places < last) & ((places - first) % step == 0)
    shape = [-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]
    return torch.where(written.view(shape), part.index_select(dim, source), x)


def select_scatter(x: Tensor, part: Tensor, dim: int, index: int) -> Tensor:
    """`x[index] = part` along an axis."""
    return slice_scatter(x, part.unsqueeze(dim), dim, index, index + 1 if index != -1 else None)


def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """`x[mask] = value`, of one value; other indices stay as they are."""
    mask = indices[0]
    if len(indices) > 1 or mask is None or mask.dtype != torch.bool or values.numel() != 1 or accumulate:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.where(mask.reshape([*mask.shape, *[1] * (x.dim() - mask.dim())]), values.reshape([]), x)
