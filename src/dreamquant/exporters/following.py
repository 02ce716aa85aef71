"""A student that goes on from a file's integers behind every quantizer, so that each step is compared by itself.

The two are apart by the rounding of their sums and by nothing else. How much that is follows from the step: it is measured, on
few images, as the distance between the student's own float32 and double precision, and functions that a runtime computes by an
approximation are moved by what such have a right to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from dreamquant.network.graph import aten, outputs_of, tensor_of
from dreamquant.network.interpreter import Values, compute, interpret
from dreamquant.network.operators import CLIPPING, SOFTMAX, WEIGHTED, data_inputs, is_call
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.moves import is_passthrough, unmoved
from dreamquant.quantization.walk import quantizer_of

Integers = Mapping[fx.Node, NDArray[Any]]

ORDERS = 32  # times a sum's own rounding: another order of as many terms rounds up to 8 times as far on the networks at hand
EPSILON = 2.0**-24  # half the distance of two float32 numbers around 1
APPROXIMATION = 2.0**-22  # of their range: what a runtime's exp, tanh and erf are off
BOUNDED: set[Any] = SOFTMAX | {aten.sigmoid.default, aten.tanh.default, aten.erf.default}  # their range is 1
GATES: set[Any] = {aten.silu.default, aten.gelu.default, aten.mish.default}  # x times a function of the range 1


class Allowance:
    """How far rounding may part a step of the student's and the same step of a file: in levels, by quantizer, and by output.

    Single precision, with the approximations moved, and double go through the graph side by side, so that no value is kept.
    """

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], images: Tensor, integers: Integers) -> None:
        self.levels: dict[fx.Node, float] = {}

        def step(node: fx.Node, values: Values) -> Any:
            if node in grids:
                grid, both = grids[node], values[node.all_input_nodes[0]]
                single, double = (_in_levels(grid, x) for x in both)
                self.levels[node] = _allowed(single, double, float(grid.qmax - grid.qmin))
                return tuple(_returned(grid, integers[node], x) for x in both)
            if node.op == "call_module":
                return (quantizer_of(graph, node)(tensor_of(graph, node.all_input_nodes[0])),) * 2
            given = values.keys() & node.all_input_nodes
            return tuple(compute(graph, node, {source: values[source][side] for source in given}) for side in (0, 1))

        with torch.no_grad():
            outputs = interpret(graph, (images, images), step=step, after=_in_both_precisions)
        self.outputs = [
            _allowed(one, other, other.double().abs().max().item()) for one, other in zip(*map(outputs_of, outputs), strict=True)
        ]


def _in_both_precisions(node: fx.Node, value: tuple[Any, Any]) -> tuple[Any, Any]:
    single, double = value
    if not isinstance(single, Tensor) or not single.is_floating_point():
        return value
    if is_call(node, BOUNDED):
        single = single + APPROXIMATION
    elif is_call(node, GATES):
        single = single + APPROXIMATION * single.abs()
    return single, double.double()


def _in_levels(grid: Grid, x: Tensor) -> Tensor:
    scale, zero_point = grid.shaped(x.dim())
    return (x / scale + zero_point).clamp_(grid.qmin, grid.qmax)


def _returned(grid: Grid, integers: NDArray[Any], x: Tensor) -> Tensor:
    """What a quantizer whose integers these are gives in place of x."""
    scale, zero_point = grid.shaped(x.dim())
    return (torch.from_numpy(integers).to(x.dtype) - zero_point) * scale


def _allowed(single: Tensor, double: Tensor, largest: float) -> float:
    return ORDERS * (furthest(single, double) + EPSILON * largest)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """The absolute difference, value by value, in double precision; 0 between infinities of one sign."""
    one, other = one.double(), other.double()
    return torch.where(one == other, 0.0, (one - other).abs())


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest of these differences."""
    off = distance(one, other)
    return off.max().item() if off.numel() else 0.0


def biases_rounded(graph: fx.GraphModule, grids: Mapping[fx.Node, Grid]) -> dict[fx.Node, float]:
    """How many levels a runtime may move each quantizer's values by rounding float biases.

    A layer that it runs in integers has an int32 bias on the grid input scale x weight scale: a float bias is moved by half a
    step of that at most.
    """
    return {node: _bias_rounded(graph, grids, node, grid) for node, grid in grids.items()}


def _bias_rounded(graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], node: fx.Node, grid: Grid) -> float:
    layer = node.all_input_nodes[0]
    while is_call(layer, CLIPPING) or is_passthrough(layer):
        layer = data_inputs(layer)[0]
    if not is_call(layer, WEIGHTED) or len(layer.args) < 3:
        return 0.0
    source, weight, bias = unmoved(data_inputs(layer)[0]), layer.args[1], layer.args[2]
    if not (isinstance(bias, fx.Node) and bias.op == "get_attr" and isinstance(weight, fx.Node) and weight.op == "call_module"):
        return 0.0
    weights = quantizer_of(graph, weight).grid
    if source not in grids or not isinstance(weights, Grid):
        return 0.0
    return (grids[source].scale * weights.scale / grid.scale).max().item() / 2


class Comparison:
    """Counts, piece by piece, where the student's integers are not the file's: across a border, or `apart`, by tensor.

    `allowed` says how far from a border, in levels, a value may be on its other side.
    """

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], allowed: Mapping[fx.Node, float]) -> None:
        self.graph, self.grids, self.allowed = graph, grids, allowed
        self.values = self.borders = 0
        self.apart: dict[str, int] = {}

    def run(self, images: Tensor, integers: Integers) -> list[Tensor]:
        """The student's outputs, each step's inputs being the file's."""

        def step(node: fx.Node, values: Values) -> Any:
            if node in self.grids:
                x: Tensor = values[node.all_input_nodes[0]]
                self._look(node, _in_levels(self.grids[node], x), torch.from_numpy(integers[node]))
                return _returned(self.grids[node], integers[node], x)
            if node.op == "call_module":
                return quantizer_of(self.graph, node)(tensor_of(self.graph, node.all_input_nodes[0]))
            return compute(self.graph, node, values)

        with torch.no_grad():
            return outputs_of(interpret(self.graph, images, step=step))

    def _look(self, node: fx.Node, levels: Tensor, theirs: Tensor) -> None:
        off = levels.sub_(theirs).abs_()
        near = off <= 0.5 + self.allowed[node]
        apart = int((~near).sum())  # NaN is apart
        self.values += theirs.numel()
        self.borders += int((near & (off > 0.5)).sum())
        if apart:
            name = node.all_input_nodes[0].name
            self.apart[name] = self.apart.get(name, 0) + apart
