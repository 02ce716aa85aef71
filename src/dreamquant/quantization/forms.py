"""Forms: what a plan asks of the grids of activations, constants and weights, beside the range that they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dreamquant.network.graph import aten
from dreamquant.network.operators import TRANSPOSED, output_channel_axis
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.histogram import Values, summarize
from dreamquant.quantization.plan import Plan


@dataclass(frozen=True)
class Form:
    """The form of the grids of so many bits: as the fields of `Plan` say."""

    bits: int
    zero_point: str
    signed: bool
    narrow: bool = False
    power_of_two: bool = False
    minimum_range: float = 0.0

    def symmetric(self, low: Tensor) -> bool:
        """Whether levels lie evenly around 0, for values the least of which is `low`."""
        return self.zero_point in ("none", "middle") or (self.zero_point == "ends" and bool((low < 0).any()))

    def grid(self, low: Tensor, high: Tensor, values: Tensor | Values | None = None, *, axis: int | None = None) -> Grid:
        """The grid over [low, high], each (1,) or (channels,). A scale that has to be a power of two holds the range, or the
        part of it that leaves the least squared error on `values` (groups, ...)."""
        low, high = low.reshape(-1), high.reshape(-1)
        if self.minimum_range:
            high = torch.maximum(high, low.clamp(max=0.0) + self.minimum_range)
        symmetric = self.symmetric(low)
        grid = grid_of_range(low, high, bits=self.bits, symmetric=symmetric, narrow=self.narrow, axis=axis)
        if self.power_of_two:
            grid = _on_powers(grid, low, values)
        if self.signed != (grid.qmin < 0):
            half = (1 << (self.bits - 1)) * (-1 if self.signed else 1)
            grid = replace(grid, zero_point=grid.zero_point + half, qmin=grid.qmin + half, qmax=grid.qmax + half)
        return grid


def activation_form(plan: Plan, bits: int) -> Form:
    """The form of a tensor of activations, or of a constant that meets them."""
    signed = plan.activation_sign == "signed" or plan.activation_zero_point == "none"
    power = plan.scales == "power_of_two"
    return Form(bits, plan.activation_zero_point, signed, power_of_two=power, minimum_range=plan.minimum_range)


def weight_form(plan: Plan, bits: int) -> Form:
    """The form of a layer's weights."""
    symmetric = plan.weight_symmetric
    power = plan.scales == "power_of_two"
    return Form(bits, "none" if symmetric else "free", symmetric, plan.weight_narrow and symmetric, power)


def weight_axis(layer: fx.Node, plan: Plan) -> int | None:
    """The axis of a layer's weight that has a scale for each of its channels; None for one scale in all."""
    linear = layer.target is aten.linear.default
    operator = "linear" if linear else "conv_transpose" if layer.target in TRANSPOSED else "conv"
    granularity = plan.layer(layer.name).granularity or plan.weight_granularity
    return output_channel_axis(layer) if granularity == "channel" and operator not in plan.per_tensor else None


def power_above(scale: Tensor) -> Tensor:
    """The least powers of two that are no smaller."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def _on_powers(grid: Grid, low: Tensor, values: Tensor | Values | None) -> Grid:
    """The grid with a scale that is a power of two: the next larger or, where that is better on the values, the one below it."""
    above = power_above(grid.scale)
    whole = _with_scale(grid, above, low)
    if values is None:
        return whole
    points, weights = summarize(values)
    part = _with_scale(grid, above / 2, low)
    errors = [((replace(one, axis=0).fake(points) - points).square() * weights).sum(1) for one in (whole, part)]
    return _with_scale(grid, torch.where(errors[1] < errors[0], above / 2, above), low)


def _with_scale(grid: Grid, scale: Tensor, low: Tensor) -> Grid:
    if grid.qmin < 0:
        return replace(grid, scale=scale)
    zero_point = (grid.qmin - torch.round(low.float().clamp(max=0.0) / scale)).clamp(grid.qmin, grid.qmax)
    return replace(grid, scale=scale, zero_point=zero_point)


def is_power_of_two(scale: float) -> bool:
    """Whether a scale is one."""
    return scale > 0 and math.frexp(scale)[0] == 0.5
