"""Units: the pieces of a student that are reconstructed one after the other, each from one tensor to one tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from dreamquant.network.graph import Network, aten, device_of, needed_by, output_nodes, tensor_of
from dreamquant.network.interpreter import Values, call, compute, interpret
from dreamquant.network.notes import is_tensor, notes, shape_of
from dreamquant.network.opaque import is_opaque
from dreamquant.network.operators import WEIGHTED, data_inputs, data_nodes, is_call
from dreamquant.network.segments import Segment, segments
from dreamquant.quantization.sites import ACTIVATION_FUNCTIONS
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import float_tensor
from dreamquant.quantization.weights import is_depthwise

Modules = Mapping[fx.Node, Any]  # by the node of a quantizer: what is run in its place
_SIZE = aten.sym_size.int
POOLED = 8  # times fewer values: a pooling that leaves little of a map to learn from


@dataclass(frozen=True)
class Unit:
    """`nodes` compute `output` from `input`; all of them are nodes of a student's graph, quantizers included."""

    graph: fx.GraphModule
    input: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def layers(self) -> list[fx.Node]:
        """The nodes with weights."""
        return [node for node in self.nodes if is_call(node, WEIGHTED)]

    @property
    def weights(self) -> list[fx.Node]:
        """The nodes that quantize weights."""
        sources = [layer.args[1] for layer in self.layers]
        return [source for source in sources if isinstance(source, fx.Node) and source.op == "call_module"]

    @property
    def quantizers(self) -> list[fx.Node]:
        """The nodes that quantize activations."""
        return [node for node in self.nodes if node.op == "call_module"]

    def run(self, x: Tensor, modules: Modules | None = None, *, exact: bool = False) -> Tensor:
        """The unit's output for inputs x, wherever they lie; `modules` run in the place of their quantizers. `exact`: without any
        quantizer."""
        x = x.to(device_of(self.graph))

        def step(node: fx.Node, values: Values) -> Any:
            if node.op == "get_attr":
                return (float_tensor if exact else tensor_of)(self.graph, node)
            if node.op == "call_module":
                source = values[node.all_input_nodes[0]]
                if exact or (notes(node).kind == "bias" and modules):
                    return source
                return call(node, values, modules[node]) if modules and node in modules else compute(self.graph, node, values)
            if node.target is _SIZE and node.all_input_nodes[0] not in self.nodes:
                axis: Any = node.args[1]
                return len(x) if axis == 0 else shape_of(node.args[0])[axis]
            return compute(self.graph, node, values)

        result: Tensor = interpret(self.graph, x, step=step, values={self.input: x}, nodes=self._needed)
        return result

    @cached_property
    def _needed(self) -> list[fx.Node]:
        """The unit's nodes and what they read beside its input: stored tensors, their quantizers, sizes."""
        given = set(data_nodes(self.graph.graph)).difference(self.nodes)
        needed = needed_by(self.nodes, given)
        return [node for node in self.graph.graph.nodes if node in needed]


def segment_units(student: Student) -> list[Unit]:
    """One unit a segment, up to where little is left of its map: a global pooling, and a quantizer, belong to the unit behind.

    A block is learnt for the map that it computes, as BRECQ and Genie do: of a pooled one a few images say too little. One with
    an operator that no gradient passes, or whose output has its images elsewhere than its input, is learnt layer by layer.
    """
    found: list[Unit] = []
    moved: list[fx.Node] = []
    graph = student.network.graph
    source: fx.Node | None = None
    for segment in segments(student.network):
        if any(map(is_opaque, _with_tuples(segment.nodes))) or _moves_images(student.network, source or segment.input, segment):
            found += [_layer_unit(graph, layer) for layer in segment.layers]
            moved, source = [], None
            continue
        nodes = [*moved, *segment.nodes]
        moved = []
        while len(nodes) > (end := _end(nodes)):
            moved = nodes[end:] + moved
            nodes = nodes[:end]
        found.append(Unit(graph, source or segment.input, tuple(nodes)))
        source = nodes[-1]
    return found


def _end(nodes: list[fx.Node]) -> int:
    """How many of a segment's nodes are left without a last quantizer, and without pooling at its end and what follows that."""
    if nodes[-1].op == "call_module" and set(nodes[-1].all_input_nodes) <= {nodes[-2]}:
        return len(nodes) - 1
    end = len(nodes)
    tensors = [node for node in nodes if is_tensor(node)]  # not the sizes that are taken of them
    for before, node in reversed(list(pairwise(tensors))):
        if is_call(node, WEIGHTED) or data_inputs(node) != [before]:
            break
        if POOLED * _values(node) <= _values(before):
            end = nodes.index(before) + 1
    return end


def _values(node: fx.Node) -> int:
    """Values of one image in a node's tensor."""
    return math.prod(shape_of(node)[1:])


def grouped(units: list[Unit]) -> list[Unit]:
    """Units of one depthwise layer joined with the unit behind them, so that both are rounded for their common output."""
    found: list[Unit] = []
    for unit in units:
        before = found[-1] if found else None
        if before is not None and len(before.layers) == 1 and len(unit.layers) == 1 and is_depthwise(before.layers[0]):
            found[-1] = Unit(unit.graph, before.input, (*before.nodes, *unit.nodes))
        else:
            found.append(unit)
    return found


def layer_units(student: Student) -> list[Unit]:
    """One unit a layer with weights, with the BatchNorm and the activation function that alone read it."""
    graph = student.network.graph
    return [_layer_unit(graph, layer) for layer in graph.graph.nodes if is_call(layer, WEIGHTED)]


def _layer_unit(graph: fx.GraphModule, layer: fx.Node) -> Unit:
    nodes = [layer]
    while len(nodes[-1].users) == 1:
        after = next(iter(nodes[-1].users))
        if not is_call(after, ACTIVATION_FUNCTIONS | {aten.batch_norm.default}) or data_inputs(after) != [nodes[-1]]:
            break
        nodes.append(after)
    return Unit(graph, data_inputs(layer)[0], tuple(nodes))


def _moves_images(network: Network, source: fx.Node, segment: Segment) -> bool:
    """Whether the rows of a segment's output are others than those of `source`."""
    ends = dict(zip(output_nodes(network.graph.graph), network.outputs, strict=False))
    turned = segment.output in ends and ends[segment.output].axis != 0
    return turned or shape_of(segment.output)[:1] != shape_of(source)[:1]


def _with_tuples(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes, and those of several results that some of them are taken from."""
    return [*nodes, *(node.all_input_nodes[0] for node in nodes if node.target is operator.getitem)]
