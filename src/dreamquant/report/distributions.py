"""Where the values of a layer lie among the levels that they may take: its weights, and what enters it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dreamquant.network.graph import tensor_of
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.student import Student, weight_quantizer
from dreamquant.quantization.walk import Chunks, float_tensor, walk
from dreamquant.report.layers import grid_at, input_quantizer
from dreamquant.report.words import counted, number, percent, sentence

BINS = 64  # of a grid's range; a whole number of them for a level, or of levels for one
FINEST = 8  # bins of a level
DRAWN = 32  # levels, at most, that are drawn one by one
BEYOND = 0.5  # of the range, to each side of it: values further out are counted at the edge


@dataclass(frozen=True)
class Histogram:
    """Shares (of 1) of values in bins of `width` from `low` on; `levels` to draw, and the `ends` of what rounding reaches."""

    low: float
    width: float
    shares: tuple[float, ...]
    ends: tuple[float, float]
    levels: tuple[float, ...] = ()

    @property
    def high(self) -> float:
        return self.low + self.width * len(self.shares)


@dataclass(frozen=True)
class Panel:
    """A histogram and what is to be seen in it; `axis` says what lies along its axis."""

    histogram: Histogram
    axis: str
    caption: str


@dataclass(frozen=True)
class Close:
    """A layer up close; a part that is float has no panel."""

    layer: str
    weights: Panel | None
    inputs: Panel | None


def close_ups(student: Student, images: Tensor, names: Sequence[str]) -> list[Close]:
    """Weights and inputs of some layers, the inputs on images (N, C, H, W) as the quantized network has them."""
    nodes = {node.name: node for node in student.network.graph.graph.nodes if node.name in names}
    inputs = input_panels(student, images, [nodes[name] for name in names])
    return [Close(name, weight_panel(student, nodes[name]), inputs.get(name)) for name in names]


# ---- weights


def weight_panel(student: Student, layer: fx.Node) -> Panel | None:
    """The float weights of a layer among the levels that they were moved to."""
    quantizer = weight_quantizer(layer)
    grid = grid_at(student, quantizer)
    if quantizer is None or grid is None:
        return None
    graph, stored = student.network.graph, quantizer.all_input_nodes[0]
    now, before = tensor_of(graph, stored), float_tensor(graph, stored)
    errors = channel_errors(before, grid.fake(now), grid.axis)
    if isinstance(grid, Codebook):
        return _codebook_panel(before, grid, errors)
    if grid.axis is None:
        histogram, outside = _of_grid(before.flatten(), grid)
        return Panel(histogram, "weight", _about_weights(f"The layer's {before.numel():,} weights.", grid, outside, errors))
    scale, zero_point = grid.shaped(before.dim())
    histogram, outside = _of_levels((before / scale + zero_point).flatten(), grid.qmin, grid.qmax)
    said = (
        f"The weights of all {counted(before.shape[grid.axis], 'channel')}, each channel measured by its own step: whole numbers"
        " are levels."
    )
    return Panel(histogram, "weight, in steps of its channel", _about_weights(said, grid, outside, errors))


def channel_errors(before: Tensor, after: Tensor, axis: int | None) -> Tensor:
    """The root mean square of what rounding changed, over that of the weights: one a channel of `axis`, or one for all."""
    rows, moved = (
        value.double().reshape(1, -1) if axis is None else value.double().transpose(0, axis).flatten(1)
        for value in (before, after)
    )
    return (moved - rows).square().sum(1).sqrt() / rows.square().sum(1).sqrt().clamp(min=1e-30)


def _about_weights(said: str, grid: Grid, outside: float, errors: Tensor) -> str:
    cut = _about_outside(outside, "are cut to an end")
    return f"{said} {_levels(grid.qmax - grid.qmin + 1)}{cut} {_about_errors(errors)}"


def _about_outside(share: float, what: str) -> str:
    return f" {sentence(percent(share))} lie outside and {what}." if share else ""


def _levels(count: int) -> str:
    return f"The lines are the {count} levels." if count <= DRAWN else f"The band is the range of the {count} levels."


def _about_errors(errors: Tensor) -> str:
    if len(errors) == 1:
        return f"Rounding changed them by {percent(errors.item())} of their size."
    worst = int(errors.argmax())
    return (
        f"Rounding changed them by {percent(errors.median().item())} of their size in the middle channel, by"
        f" {percent(errors[worst].item())} in the worst, number {worst}."
    )


def _codebook_panel(before: Tensor, codebook: Codebook, errors: Tensor) -> Panel:
    """A codebook's levels lie anywhere, so that channels cannot be laid on top of one another: the worst one is drawn."""
    rows = codebook.rows(before)
    worst = int(errors.argmax())
    levels = torch.unique(codebook.levels[worst])
    histogram, outside = _histogram(rows[worst], float(levels[0]), float(levels[-1]), BINS)
    whose = f"The layer's {rows.numel():,} weights."
    if len(rows) > 1:
        whose = f"The {counted(rows.shape[1], 'weight')} of channel {worst}, the worst of {len(rows)}."
    lines = tuple(levels.tolist()) if len(levels) <= DRAWN else ()
    drawn = Histogram(histogram.low, histogram.width, histogram.shares, histogram.ends, lines)
    said = (
        f"{whose} {_levels(len(levels))}{_about_outside(outside, 'go to the outer levels')} {_about_errors(errors[worst, None])}"
    )
    return Panel(drawn, "weight", said)


# ---- inputs


def input_panels(student: Student, images: Tensor, layers: Sequence[fx.Node]) -> dict[str, Panel]:
    """What enters layers on images, by the layers' names; those with a float input are left out."""
    wanted = {layer.name: input_quantizer(layer) for layer in layers}
    found: dict[fx.Node, Panel] = {}

    def before(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:  # noqa: ARG001
        grid = grid_at(student, node)
        if node in wanted.values() and isinstance(grid, Grid):
            found[node] = _input_panel(torch.cat([value.flatten() for value in quantized]), grid, len(images))

    walk(student.network, images, before=before)
    return {name: found[node] for name, node in wanted.items() if node in found}


def _input_panel(values: Tensor, grid: Grid, count: int) -> Panel:
    zeros = (values == 0).double().mean().item()
    histogram, outside = _of_grid(values[values != 0], grid)
    outside *= 1 - zeros
    low, high = (float((end - grid.zero_point) * grid.scale) for end in (grid.qmin, grid.qmax))
    said = f"What enters on {counted(count, 'dream')}, with all before it quantized. The grid has {grid.qmax - grid.qmin + 1}"
    said += f" levels from {number(low)} to {number(high)}."
    if zeros:
        said += f" {sentence(percent(zeros))} of the values are exactly 0 and not drawn."
    if outside:
        far = max(values.max().item() - high, low - values.min().item())
        said += f" {sentence(percent(outside))} lie outside and are cut to an end, the furthest by {number(far)}."
    return Panel(histogram, "value", said)


# ---- bins


def _of_grid(values: Tensor, grid: Grid) -> tuple[Histogram, float]:
    """Values on a grid of one scale, in the values' own unit; and what share of them rounding cuts off."""
    scale, zero_point = float(grid.scale), float(grid.zero_point)
    histogram, outside = _of_levels(values / scale + zero_point, grid.qmin, grid.qmax)

    def back(level: float) -> float:
        return (level - zero_point) * scale

    first, last = histogram.ends
    levels = tuple(back(level) for level in histogram.levels)
    drawn = Histogram(back(histogram.low), histogram.width * scale, histogram.shares, (back(first), back(last)), levels)
    return drawn, outside


def _of_levels(values: Tensor, qmin: int, qmax: int) -> tuple[Histogram, float]:
    """Values in steps of a grid; the range ends half a step beyond the outer levels, where rounding becomes cutting."""
    count = qmax - qmin + 1
    histogram, outside = _histogram(values, qmin - 0.5, qmax + 0.5, min(BINS, FINEST * count))
    levels = tuple(float(level) for level in range(qmin, qmax + 1)) if count <= DRAWN else ()
    return Histogram(histogram.low, histogram.width, histogram.shares, histogram.ends, levels), outside


def _histogram(values: Tensor, low: float, high: float, bins: int) -> tuple[Histogram, float]:
    """Values in `bins` between low and high and as many more as they need, and the share of them outside."""
    if not values.numel():
        return Histogram(low, (high - low) / bins, (0.0,) * bins, (low, high)), 0.0
    values = values.double()
    width = max(high - low, 1e-30) / bins
    most = int(BEYOND * bins)
    below, above = (
        max(0, min(most, int(distance / width) + (distance > 0)))
        for distance in (low - values.min().item(), values.max().item() - high)
    )
    places = ((values - low) / width).floor().long().clamp(-below, bins + above - 1) + below
    shares = places.bincount(minlength=bins + below + above).double() / len(values)
    outside = ((values < low) | (values > high)).double().mean().item()
    return Histogram(low - below * width, width, tuple(shares.tolist()), (low, high)), outside
