"""Forms: what a plan asks of the grids of activations, constants and weights, beside the range that they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError
from dreamquant.network.graph import aten
from dreamquant.network.operators import SOFTMAX, TRANSPOSED, is_call, output_channel_axis
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.histogram import Values, summarize
from dreamquant.quantization.plan import Fixed, FixedOperator, Plan

FIXED_OPERATORS: dict[FixedOperator, set[Any]] = {
    "sigmoid": {aten.sigmoid.default},
    "hard_sigmoid": {aten.hardsigmoid.default},
    "softmax": SOFTMAX,
    "log_softmax": {aten.log_softmax.int, aten._log_softmax.default},
    "tanh": {aten.tanh.default},
}


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


def fixed_form(node: fx.Node, plan: Plan, bits: int) -> Fixed | None:
    """What the plan fixes for the results of a node, if it does."""
    return next((one for one in plan.fixed if one.bits == bits and is_call(node, FIXED_OPERATORS[one.operator])), None)


def fixed_grid(deciders: tuple[fx.Node, ...], plan: Plan, bits: int) -> Grid | None:
    """The grid of tensors that the plan gives one of its own. `OptionError` where others, or other such, share it."""
    found = [fixed_form(node, plan, bits) for node in deciders]
    first = next((one for one in found if one is not None), None)
    if first is None:
        return None
    if any((one and (one.steps, one.zero_point)) != (first.steps, first.zero_point) for one in found):
        names = ", ".join(node.name for node in deciders)
        raise OptionError(f"plan {plan.name} fixes the grid of what {first.operator} gives, and {names} have to share one")
    form = activation_form(plan, bits)
    low = -(1 << (bits - 1)) if form.signed else 0
    scale = torch.tensor([1 / first.steps], dtype=torch.float32)
    return Grid(scale, torch.full_like(scale, float(first.zero_point)), low, low + (1 << bits) - 1)


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
