"""The layers of a result: what each is stored in, what it does to the answers alone, and what is left of its signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dreamquant.allocation import LayerDamage
from dreamquant.flow import Result
from dreamquant.network.notes import notes, shape_of
from dreamquant.network.operators import PRODUCTS, WEIGHTED, data_inputs, is_call
from dreamquant.network.pairs import groups_of
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.moves import is_passthrough
from dreamquant.quantization.student import Student, weight_quantizer
from dreamquant.quantization.walk import quantizer_of
from dreamquant.quantization.weights import is_depthwise


@dataclass(frozen=True)
class LayerRow:
    """One layer of a result; None is for what it does not have, or what was not measured.

    `weight` is the name of the stored tensor. `weights` and `inputs` are what these do alone to the network's answers, in nats;
    `sqnr` is in decibels.
    """

    name: str
    operator: str
    weight: str = ""
    shape: tuple[int, ...] = ()
    weight_bits: int | None = None
    input_bits: int | None = None
    granularity: str = ""
    weights: float | None = None
    inputs: float | None = None
    sqnr: float | None = None
    note: str = ""

    @property
    def both(self) -> float | None:
        """The two damages added up, where there is one."""
        known = [value for value in (self.weights, self.inputs) if value is not None]
        return sum(known) if known else None


def layer_rows(result: Result, damages: Sequence[LayerDamage]) -> list[LayerRow]:
    """The layers of the student, and those of the float network that it has no more, the worst first."""
    student = _layers(result.student.network.graph.graph)
    gone = {name: node for name, node in _layers(result.network.graph.graph).items() if name not in student}
    alone = {damage.layer: damage for damage in damages}
    sqnr = {layer.layer: layer.sqnr for layer in result.assessment.layers}
    rows = [_row(result.student, node, alone.get(name), sqnr.get(name)) for name, node in student.items()]
    rows += [LayerRow(name, operator(node), note="not in the file under this name") for name, node in gone.items()]
    return worst_first(rows)


def worst_first(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """By the damage that a layer does alone, the largest first; then, where none was measured, by what is left of its signal."""

    def key(row: LayerRow) -> tuple[float, float]:
        return -math.inf if row.both is None else row.both, -math.inf if row.sqnr is None else -row.sqnr

    return sorted(rows, key=key, reverse=True)


def input_quantizer(layer: fx.Node) -> fx.Node | None:
    """The node that puts what enters a layer on its grid; operations that only rearrange values may lie between."""
    node = layer.args[0]
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            return node
        if not is_passthrough(node):
            return None
        node = data_inputs(node)[0]
    return None


def grid_at(student: Student, quantizer: fx.Node | None) -> Grid | Codebook | None:
    """The grid of a quantizer; None where there is no quantizer, or none that does anything."""
    return None if quantizer is None else quantizer_of(student.network.graph, quantizer).grid


def operator(layer: fx.Node) -> str:
    """The name of a layer's operation: `conv2d`, `linear`, `depthwise conv2d`."""
    name = str(layer.target).split(".")[1]
    if not is_call(layer, WEIGHTED) or not isinstance(layer.args[1], fx.Node):
        return name
    if is_depthwise(layer):
        return f"depthwise {name}"
    return name if groups_of(layer) == 1 else f"grouped {name}"


def _layers(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes if is_call(node, WEIGHTED | PRODUCTS)}


def _row(student: Student, layer: fx.Node, alone: LayerDamage | None, sqnr: float | None) -> LayerRow:
    weight, entering = grid_at(student, weight_quantizer(layer)), grid_at(student, input_quantizer(layer))
    weighted = is_call(layer, WEIGHTED)
    return LayerRow(
        name=layer.name,
        operator=operator(layer),
        weight=_weight_name(layer) if weighted else "",
        shape=_shape(layer) if weighted else (),
        weight_bits=None if weight is None else weight.bits,
        input_bits=None if entering is None else entering.bits,
        granularity="" if weight is None else granularity(weight, own_bits=student.plan.channel_bits),
        weights=None if alone is None else alone.weights,
        inputs=None if alone is None or entering is None else alone.activations,
        sqnr=sqnr,
        note="" if weight is not None or not weighted else "float",
    )


def granularity(grid: Grid | Codebook, *, own_bits: bool = False) -> str:
    """What shares the levels of a weight: all of it, or each of its channels."""
    kind = "tensor" if grid.axis is None else "channel"
    if isinstance(grid, Codebook):
        return f"{kind}, codebook"
    return f"{kind}, bits of its own" if own_bits and grid.axis is not None else kind


def _weight_name(layer: fx.Node) -> str:
    node = layer.args[1]
    while isinstance(node, fx.Node) and node.op == "call_module":
        node = node.all_input_nodes[0]
    return str(notes(node).origin or node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def _shape(layer: fx.Node) -> tuple[int, ...]:
    weight = layer.args[1]
    return shape_of(weight) if isinstance(weight, fx.Node) else ()
