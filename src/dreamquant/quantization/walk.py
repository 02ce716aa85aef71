"""A network run node by node over all samples, so that what is found at one node can decide how the next is run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, fx

from dreamquant.limits import memory
from dreamquant.network.edit import add_buffer
from dreamquant.network.graph import Network, in_pieces, tensor_of
from dreamquant.network.interpreter import Values, call, interpret
from dreamquant.network.live import at_once
from dreamquant.network.notes import notes, set_notes
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import FakeQuantize, Grid

CHUNK = 32  # images run at once
HELD = 256 * 2**20  # bytes of values that wait in memory for all images ...
PARTS = 8  # ... or such a part of the limit, where that is less

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
_INSIDE = object()  # in place of what a piece computes by itself


class _Both(NamedTuple):
    """What the student has at a node, and what the float network: in pieces, or one value where no image is asked for."""

    quantized: list[Any]
    exact: list[Any]
    stored: bool = False


def walk(
    network: Network,
    images: Tensor,
    *,
    chunk: int = CHUNK,
    before: Before | None = None,
    after: After | None = None,
    pieces: Mapping[fx.Node, P] | None = None,
    during: Callable[[P, Chunks, Chunks], tuple[Chunks, Chunks]] | None = None,
) -> None:
    """Run a student's network on images (N, C, H, W), with its quantizers and, beside it, without any.

    Each node is run on all pieces of `chunk` images before the next node is. `before(node, quantized, float)` is called with
    the input of an activation quantizer that is about to run; `after(node, quantized, float)` with the outputs of every
    other node that depends on the images, which it may replace in place. Where no quantizer lies before a node, the two
    lists hold the same tensors. Values are dropped after their last use. `pieces`, by their first nodes, are not run node by
    node: `during(piece, quantized, float)` gets what both networks have as the piece's input, and returns its outputs.
    """
    graph = network.graph
    parts = list(in_pieces(images, network.batch, chunk, network.device))

    def step(node: fx.Node, values: Values) -> Any:
        sources = node.all_input_nodes
        if pieces is not None and node in pieces:
            assert during is not None
            piece = pieces[node]
            entering: _Both = values[piece.input]
            values.update(dict.fromkeys(piece.nodes, _INSIDE))
            values[piece.output] = _Both(*during(piece, entering.quantized, entering.exact))
            return values[node]
        if node.op == "output" or any(values[source] is _INSIDE for source in sources):
            return _INSIDE  # what gives several tensors, as a split does, is no node of a piece, and is computed in it
        if node.op == "get_attr":
            return _Both([tensor_of(graph, node)], [float_tensor(graph, node)], stored=True)
        inputs: list[_Both] = [values[source] for source in sources]
        stored = all(one.stored for one in inputs)
        if node.op == "call_module":
            if before is not None and not stored:
                before(node, inputs[0].quantized, inputs[0].exact)
            quantizer = quantizer_of(graph, node)
            return _Both([quantizer(value.to(network.device)) for value in inputs[0].quantized], inputs[0].exact, stored)
        count = 1 if stored else len(parts)
        quantized = _computed(node, {source: values[source].quantized for source in sources}, count, network.device)
        same = all(one is other for each in inputs for one, other in zip(each.quantized, each.exact, strict=True))
        exact = (
            list(quantized)
            if same
            else _computed(node, {source: values[source].exact for source in sources}, count, network.device)
        )
        if after is not None and not stored and isinstance(quantized[0], Tensor):
            after(node, quantized, exact)
        return _Both(quantized, exact, stored)

    with torch.no_grad():
        interpret(graph, _Both(parts, list(parts)), step=step)


def walk_by_layers(
    network: Network,
    images: Tensor,
    layers: Collection[fx.Node],
    look: Callable[[fx.Node, Tensor, Tensor], None],
    settle: Callable[[fx.Node], Tensor | None],
) -> None:
    """Run a student's network on images (N, C, H, W), and the float network beside it, up to each of `layers` in turn: all
    images are there before any goes on.

    `look(layer, quantized, float)` is shown the layer's output, a few images at a time. What `settle(layer)` then gives is added
    to the quantized one. Only values that are still needed are held: `HELD` bytes in memory, the others in temporary files.
    """
    graph = network.graph
    nodes = list(graph.graph.nodes)
    stops = [number for number, node in enumerate(nodes) if node in layers]
    last_use = {source: number for number, node in enumerate(nodes) for source in node.all_input_nodes}
    fixed: set[fx.Node] = set()  # what no image changes, and so is kept once
    for node in nodes:
        if node.op == "get_attr" or (node.all_input_nodes and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)

    def step(node: fx.Node, values: Values) -> Any:
        if node.op == "get_attr":
            return tensor_of(graph, node), float_tensor(graph, node)
        inputs = {source: values[source] for source in node.all_input_nodes}
        if node.op == "call_module":
            ((quantized, exact),) = inputs.values()
            return quantizer_of(graph, node)(quantized), exact
        quantized = call(node, {source: value[0] for source, value in inputs.items()})
        if all(one is other for one, other in inputs.values()):
            return quantized, quantized
        return quantized, call(node, {source: value[1] for source, value in inputs.items()})

    pieces = list(in_pieces(images, network.batch, at_once(network, CHUNK), network.device))
    stored: Values = {}
    start, shift = 0, None
    with _Shelf() as shelf, torch.no_grad():
        for stop in stops:
            stored = {node: value for node, value in stored.items() if last_use[node] >= start}
            for number, piece in enumerate(pieces):
                values: Values = stored | (shelf.take(number) if start else {})
                if shift is not None:
                    quantized, exact = values[nodes[start - 1]]
                    values[nodes[start - 1]] = quantized + shift, exact
                going_on = {node: value for node, value in values.items() if last_use[node] > stop and node not in fixed}

                def after(
                    node: fx.Node, value: Any, going_on: Values = going_on, stored: Values = stored, stop: int = stop
                ) -> Any:
                    if node in fixed and node in last_use:
                        stored[node] = value
                    elif last_use.get(node, 0) > stop:
                        going_on[node] = value
                    return value

                found = interpret(graph, (piece, piece), step=step, after=after, values=values, nodes=nodes[start : stop + 1])
                look(nodes[stop], *found)
                shelf.put(number, going_on)
            start, shift = stop + 1, settle(nodes[stop])


class _Shelf:
    """Values by number: those that find room in memory there, the others in files that go with it."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="dreamquant-")
        self._held: dict[int, tuple[int, Values]] = {}
        self._filed: dict[int, tuple[list[fx.Node], Path]] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        self._folder.cleanup()

    def put(self, number: int, values: Values) -> None:
        tensors = {id(one): one for pair in values.values() for one in pair if isinstance(one, Tensor)}
        size = sum(one.numel() * one.element_size() for one in tensors.values())
        if size + sum(taken for taken, _ in self._held.values()) <= min(HELD, memory() // PARTS):
            self._held[number] = size, values
            return
        path = Path(self._folder.name) / str(number)
        torch.save(list(values.values()), path)
        self._filed[number] = list(values), path

    def take(self, number: int) -> Values:
        if number in self._held:
            return self._held.pop(number)[1]
        nodes, path = self._filed.pop(number)
        return dict(zip(nodes, torch.load(path, weights_only=True), strict=True))


def _computed(node: fx.Node, inputs: Mapping[fx.Node, list[Any]], count: int, device: torch.device) -> list[Any]:
    """What a node gives in each of `count` pieces; stored inputs have one value for all, and pieces in files come from there."""
    pieces = [{one: found[min(place, len(found) - 1)] for one, found in inputs.items()} for place in range(count)]
    return [call(node, {one: _there(value, device) for one, value in piece.items()}) for piece in pieces]


def _there(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def keep_float(graph: fx.GraphModule, node: fx.Node) -> None:
    """Remember what a `get_attr` node reads, before the student's value of it is changed, as the float network's."""
    if notes(node).kept is None:
        name = add_buffer(graph, f"{node.target}_float", tensor_of(graph, node))
        set_notes(node, replace(notes(node), kept=name))


def float_tensor(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """What the float network has where a `get_attr` node reads the student's value."""
    kept = notes(node).kept
    return tensor_of(graph, node) if kept is None else graph.get_buffer(kept)


def quantizer_named(graph: fx.GraphModule, name: str) -> FakeQuantize:
    """The quantizer of this name."""
    quantizer = graph.get_submodule(name)
    assert isinstance(quantizer, FakeQuantize)
    return quantizer


def quantizer_of(graph: fx.GraphModule, node: fx.Node) -> FakeQuantize:
    """The quantizer that a `call_module` node runs."""
    return quantizer_named(graph, str(node.target))


@contextmanager
def with_grids(grids: Mapping[FakeQuantize, Grid | Codebook | None]) -> Iterator[None]:
    """Quantizers on other grids, or none, for as long as this lasts."""
    before = {quantizer: quantizer.grid for quantizer in grids}
    try:
        for quantizer, grid in grids.items():
            quantizer.grid = grid
        yield
    finally:
        for quantizer, kept in before.items():
            quantizer.grid = kept
