"""A network run node by node over all samples, so that what is found at one node can decide how the next is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx

from dreamquant.network.graph import is_input, tensor_of
from dreamquant.network.notes import notes, set_notes
from dreamquant.quantization.grid import FakeQuantize

CHUNK = 32  # images run at once

Chunks = list[Tensor]  # a tensor's values on all samples, in pieces
Before = Callable[[fx.Node, Chunks, Chunks], None]
After = Callable[[fx.Node, Chunks, Chunks], None]


class Piece(Protocol):
    """Nodes of a graph, the first of them first, that compute the tensor `output` from `input` and stored tensors."""

    @property
    def input(self) -> fx.Node: ...

    @property
    def nodes(self) -> tuple[fx.Node, ...]: ...

    @property
    def output(self) -> fx.Node: ...


P = TypeVar("P", bound=Piece)


def walk(
    graph: fx.GraphModule,
    images: Tensor,
    *,
    chunk: int = CHUNK,
    before: Before | None = None,
    after: After | None = None,
    pieces: Mapping[fx.Node, P] | None = None,
    during: Callable[[P, Chunks, Chunks], tuple[Chunks, Chunks]] | None = None,
) -> None:
    """Run a student's graph on images (N, C, H, W), with its quantizers and, beside it, without any.

    Each node is run on all pieces of `chunk` images before the next node is. `before(node, quantized, float)` is called with
    the input of an activation quantizer that is about to run; `after(node, quantized, float)` with the outputs of every
    other node that depends on the images, which it may replace in place. Where no quantizer lies before a node, the two
    lists hold the same tensors. Values are dropped after their last use. `pieces`, by their first nodes, are not run node by
    node: `during(piece, quantized, float)` gets what both networks have as the piece's input, and returns its outputs.
    """
    split = list(torch.split(images, chunk))
    inside: set[fx.Node] = set()
    stored: dict[fx.Node, Any] = {}
    quantized: dict[fx.Node, list[Any]] = {}
    exact: dict[fx.Node, list[Any]] = {}
    last_use = {argument: node for node in graph.graph.nodes for argument in node.all_input_nodes}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if is_input(node):
                quantized[node], exact[node] = list(split), list(split)
            elif node.op == "output":
                break
            elif pieces is not None and node in pieces:
                assert during is not None
                piece = pieces[node]
                inside.update(piece.nodes)
                quantized[piece.output], exact[piece.output] = during(piece, quantized[piece.input], exact[piece.input])
            elif node in inside or any(argument in inside and argument not in quantized for argument in node.all_input_nodes):
                inside.add(node)  # what gives several tensors, as a split does, is no node of a piece, and is computed in it
            elif not any(argument in quantized for argument in node.all_input_nodes):
                stored[node] = _compute(graph, node, stored)
            elif node.op == "call_module":
                source = node.all_input_nodes[0]
                if before is not None:
                    before(node, quantized[source], exact[source])
                quantizer = graph.get_submodule(str(node.target))
                quantized[node], exact[node] = [quantizer(value) for value in quantized[source]], exact[source]
            else:
                quantized[node], exact[node] = _both(graph, node, stored, quantized, exact, len(split))
                if after is not None and isinstance(quantized[node][0], Tensor):
                    after(node, quantized[node], exact[node])
            for argument in node.all_input_nodes:
                if last_use[argument] is node:
                    quantized.pop(argument, None)
                    exact.pop(argument, None)


def _both(
    graph: fx.GraphModule,
    node: fx.Node,
    stored: dict[fx.Node, Any],
    quantized: dict[fx.Node, list[Any]],
    exact: dict[fx.Node, list[Any]],
    count: int,
) -> tuple[list[Any], list[Any]]:
    inputs = [argument for argument in node.all_input_nodes if argument in quantized]
    constants = [argument for argument in node.all_input_nodes if argument in stored]
    same = not any(argument.op == "call_module" or notes(argument).kept is not None for argument in constants) and all(
        first is second for argument in inputs for first, second in zip(quantized[argument], exact[argument], strict=True)
    )
    first = [_compute(graph, node, {**stored, **{n: quantized[n][i] for n in inputs}}) for i in range(count)]
    if same:
        return first, list(first)
    plain = {**stored, **{argument: _float(graph, argument, stored) for argument in constants}}
    return first, [_compute(graph, node, {**plain, **{n: exact[n][i] for n in inputs}}) for i in range(count)]


def _float(graph: fx.GraphModule, node: fx.Node, stored: dict[fx.Node, Any]) -> Any:
    """A stored value as the float network has it."""
    node = node.all_input_nodes[0] if node.op == "call_module" else node
    return float_tensor(graph, node) if node.op == "get_attr" else stored[node]


def keep_float(graph: fx.GraphModule, node: fx.Node) -> None:
    """Remember what a `get_attr` node reads, before the student's value of it is changed, as the float network's."""
    if notes(node).kept is None:
        name = f"{node.target}_float"
        while hasattr(graph, name):
            name += "_"
        graph.register_buffer(name, tensor_of(graph, node))
        set_notes(node, replace(notes(node), kept=name))


def float_tensor(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """What the float network has where a `get_attr` node reads the student's value."""
    kept = notes(node).kept
    return tensor_of(graph, node) if kept is None else graph.get_buffer(kept)


def _compute(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return tensor_of(graph, node)
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda argument: values[argument])
    args, kwargs = arguments
    target = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def quantizer_of(graph: fx.GraphModule, node: fx.Node) -> FakeQuantize:
    """The quantizer that a `call_module` node runs."""
    quantizer = graph.get_submodule(str(node.target))
    assert isinstance(quantizer, FakeQuantize)
    return quantizer
