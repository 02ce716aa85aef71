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

from dreamquant.network.graph import aten, tensor_of
from dreamquant.network.operators import CLIPPING, SOFTMAX, WEIGHTED, data_inputs, is_call
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.sites import is_passthrough
from dreamquant.quantization.walk import quantizer_of

Integers = Mapping[fx.Node, NDArray[Any]]

ORDERS = 32  # times a sum's own rounding: another order of as many terms rounds up to 8 times as far on the networks at hand
EPSILON = 2.0**-24  # half the distance of two float32 numbers around 1
APPROXIMATION = 2.0**-22  # of their range: what a runtime's exp, tanh and erf are off
BOUNDED: set[Any] = SOFTMAX | {aten.sigmoid.default, aten.tanh.default, aten.erf.default}  # their range is 1
GATES: set[Any] = {aten.silu.default, aten.gelu.default, aten.mish.default}  # x times a function of the range 1


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors that a graph returns, in order."""
    return [value for value in (outputs if isinstance(outputs, tuple | list) else [outputs]) if isinstance(value, Tensor)]


class _Following(fx.Interpreter):
    """Runs a student's graph; `grids` are those of its activation quantizers, `integers` what they are to return, as levels."""

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid]) -> None:
        super().__init__(graph)
        self.graph_module, self.grids = graph, grids
        self.integers: Integers = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.grids:
            return super().run_node(n)
        (x,), _ = self.fetch_args_kwargs_from_env(n)
        grid, theirs = self.grids[n], torch.from_numpy(self.integers[n]).to(x.dtype)
        scale, zero_point = grid.shaped(x.dim())
        self.look(n, (x / scale + zero_point).clamp(grid.qmin, grid.qmax), theirs)
        return (theirs - zero_point) * scale

    def look(self, n: fx.Node, levels: Tensor, theirs: Tensor) -> None:
        """What the student has at a quantizer, in levels, and the integers that it goes on with."""
        raise NotImplementedError


class _Levels(_Following):
    """Keeps what every quantizer is given: in double precision, or in single, with the approximations moved."""

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], integers: Integers, *, double: bool) -> None:
        super().__init__(graph, grids)
        self.integers, self.double = integers, double
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n not in self.grids:  # a stored tensor's: the same levels in either precision
            value: Any = quantizer_of(self.graph_module, n)(tensor_of(self.graph_module, n.all_input_nodes[0]))
        else:
            value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if self.double:
            return value.double()
        if is_call(n, BOUNDED):
            return value + APPROXIMATION
        return value + APPROXIMATION * value.abs() if is_call(n, GATES) else value

    def look(self, n: fx.Node, levels: Tensor, theirs: Tensor) -> None:  # noqa: ARG002
        self.found[n] = levels


class Allowance:
    """How far rounding may part a step of the student's and the same step of a file: in levels, by quantizer, and by output."""

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], images: Tensor, integers: Integers) -> None:
        single = _Levels(graph, grids, integers, double=False)
        double = _Levels(graph, grids, integers, double=True)
        with torch.no_grad():
            outputs, exact = tensors_of(single.run(images)), tensors_of(double.run(images))
        self.levels = {
            node: _allowed(single.found[node], double.found[node], float(grid.qmax - grid.qmin)) for node, grid in grids.items()
        }
        self.outputs = [
            _allowed(one, other, other.double().abs().max().item()) for one, other in zip(outputs, exact, strict=True)
        ]


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
    source, weight, bias = data_inputs(layer)[0], layer.args[1], layer.args[2]
    if not (isinstance(bias, fx.Node) and bias.op == "get_attr" and isinstance(weight, fx.Node) and weight.op == "call_module"):
        return 0.0
    weights = quantizer_of(graph, weight).grid
    while is_passthrough(source):
        source = data_inputs(source)[0]
    if source not in grids or not isinstance(weights, Grid):
        return 0.0
    return (grids[source].scale * weights.scale / grid.scale).max().item() / 2


class Comparison(_Following):
    """Counts, piece by piece, where the student's integers are not the file's: across a border, or `apart`, by tensor.

    `allowed` says how far from a border, in levels, a value may be on its other side.
    """

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Grid], allowed: Mapping[fx.Node, float]) -> None:
        super().__init__(graph, grids)
        self.allowed = allowed
        self.values = self.borders = 0
        self.apart: dict[str, int] = {}

    def look(self, n: fx.Node, levels: Tensor, theirs: Tensor) -> None:
        off = (levels - theirs).abs()
        near = off <= 0.5 + self.allowed[n]
        apart = int((~near).sum())  # NaN is apart
        self.values += theirs.numel()
        self.borders += int((near & (off > 0.5)).sum())
        if apart:
            name = n.all_input_nodes[0].name
            self.apart[name] = self.apart.get(name, 0) + apart
