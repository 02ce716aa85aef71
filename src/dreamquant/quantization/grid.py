"""`Grid`: the levels that a tensor may take; `FakeQuantize`: a grid at work inside a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dreamquant.devices import CPU
from dreamquant.errors import ModelError
from dreamquant.quantization.codebook import Codebook

SMALLEST_SCALE = 1e-12  # of a tensor of nothing but zeros
BLOCK = 2**15  # values that are worked on at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Grid:
    """Uniform levels scale * (q - zero_point) for integers q in [qmin, qmax].

    `scale` (float32) and `zero_point` (float32, whole numbers) have one element, or one a channel of `axis`.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Grid:
        """The grid whose tensors are `function` of these."""
        return replace(self, scale=function(self.scale), zero_point=function(self.zero_point))

    @property
    def bits(self) -> int:
        """The number of bits that the levels take."""
        return (self.qmax - self.qmin).bit_length()

    def shaped(self, dimensions: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast along `axis` of a tensor of so many dimensions."""
        if self.axis is None:
            return self.scale.reshape(()), self.zero_point.reshape(())
        shape = [1] * dimensions
        shape[self.axis] = -1
        return self.scale.view(shape), self.zero_point.view(shape)

    def integers(self, x: Tensor) -> Tensor:
        """The integers of x, rounded half to even and saturated, as ONNX QuantizeLinear does; whole-numbered float32."""
        scale, zero_point = self.shaped(x.dim())
        return (x / scale).round_().add_(zero_point).clamp_(self.qmin, self.qmax)

    def fake(self, x: Tensor) -> Tensor:
        """x moved to its nearest level; gradients pass straight through inside the range and stop outside."""
        scale, zero_point = self.shaped(x.dim())
        if not (torch.is_grad_enabled() and x.requires_grad):
            if self.axis is not None or not x.is_contiguous():
                return self.integers(x).sub_(zero_point).mul_(scale)
            moved = torch.empty_like(x)
            for part, out in zip(torch.split(x.view(-1), block(x)), torch.split(moved.view(-1), block(x)), strict=True):
                torch.div(part, scale, out=out).round_().add_(zero_point).clamp_(self.qmin, self.qmax)
                out.sub_(zero_point).mul_(scale)
            return moved
        ratio = x / scale
        rounded = ratio + (torch.round(ratio) - ratio).detach()
        return ((rounded + zero_point).clamp(self.qmin, self.qmax) - zero_point) * scale


def block(x: Tensor) -> int:
    """How many values of a tensor are worked on at a time: a GPU has no use for less than all."""
    return BLOCK if x.device == CPU else max(x.numel(), 1)


def integer_limits(bits: int, *, signed: bool) -> tuple[int, int]:
    """(qmin, qmax): (-8, 7) for 4 signed bits, (0, 15) for 4 unsigned ones."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def grid_of_range(
    low: Tensor, high: Tensor, *, bits: int, symmetric: bool, narrow: bool = False, axis: int | None = None
) -> Grid:
    """The grid over [low, high], widened to hold 0 exactly.

    `symmetric`: signed integers with zero point 0, `narrow` without the least of them; the scale is the smallest under which both
    ends are levels.
    Otherwise unsigned integers with a zero point. Raises `ModelError` for a range that float32 does not hold.
    """
    low, high = low.float().clamp(max=0.0).reshape(-1), high.float().clamp(min=0.0).reshape(-1)
    qmin, qmax = integer_limits(bits, signed=symmetric)
    qmin += symmetric and narrow
    if not torch.isfinite(high - low).all():
        ends = f"from {low.min().item():.3g} to {high.max().item():.3g}"
        raise ModelError(f"a tensor of the network ranges {ends}, and float32 has no {bits}-bit grid for it")
    if symmetric:
        scale = torch.maximum(low / qmin, high / qmax).clamp(min=SMALLEST_SCALE)
        return Grid(scale, torch.zeros_like(scale), qmin, qmax, axis)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    zero_point = (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return Grid(scale, zero_point, qmin, qmax, axis)


class FakeQuantize(nn.Module):
    """A quantizer in a graph: its `grid` once one was set, the identity until then."""

    def __init__(self) -> None:
        super().__init__()
        self.grid: Grid | Codebook | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """What `Module.to` does to tensors, done to those of the grid."""
        self.grid = None if self.grid is None else self.grid.map(fn)
        found: FakeQuantize = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return found

    def forward(self, x: Tensor) -> Tensor:
        return x if self.grid is None else self.grid.fake(x)
