"""Following the images through a graph, and tying its sizes to their number.

Every batched tensor, read in row-major order, is `outer` rows, then the images, then the rest. A reshape keeps that
order, so the size that holds the images in its result is known, and becomes a multiple of the batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import DreamQuantError
from dreamquant.network.graph import input_node, tensor_of
from dreamquant.network.interpreter import Values, compute, interpret
from dreamquant.network.notes import Notes, is_tensor, note_value, notes, set_notes, shape_of

aten = torch.ops.aten

OTHER = 17  # the batch size at which a rewritten graph is traced; a prime that no size is likely to be a multiple of

RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.view_copy.default}
ORDER_KEPT = {*RESHAPES, aten.flatten.using_ints, aten.unflatten.int}
SIZES_AT: dict[Any, int] = {
    aten.full.default: 0,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.new_zeros.default: 1,
}
SIZES_AT |= {aten.new_ones.default: 1, aten.new_full.default: 1, aten.expand.default: 1, aten.repeat.default: 1}
REPEATS = {aten.expand.default, aten.repeat.default}


class NotFreeError(Exception):
    """The graph cannot be freed by what is known here."""


@dataclass(frozen=True)
class _Spot:
    """Where the images lie in a tensor: in dimension `axis`, whose size is `outer` x batch x something."""

    axis: int
    outer: int


class BatchFreer:
    """One walk over a graph, knowing every shape at the recorded batch size and, on the meta device, at `OTHER`."""

    def __init__(self, module: fx.GraphModule, batch: int, *, repeats: bool) -> None:
        self.module, self.graph = module, module.graph
        self.batch = batch
        self.repeats = repeats
        self.images = input_node(self.graph)
        self.values: dict[fx.Node, Any] = {}
        self.spots: dict[fx.Node, _Spot] = {}
        self._symbols: dict[int, fx.Node] = {}

    def rewrite(self) -> None:
        """Rewrite the graph in place; raises NotFreeError where the images cannot be followed."""
        images = torch.empty(OTHER, *shape_of(self.images)[1:], device="meta")
        nodes = [node for node in self.graph.nodes if node.op != "output"]
        interpret(self.module, images, step=self._rewritten, after=self._located, values=self.values, nodes=nodes, keep=True)
        self.graph.lint()
        self.module.recompile()

    def _rewritten(self, node: fx.Node, values: Values) -> Any:
        """A node's value at the other batch size, its own sizes tied to it first."""
        if node.op == "call_function":
            self._rewrite_sizes(node)
        try:
            with torch.no_grad():
                value = compute(self.module, node, values)
        except (DreamQuantError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NotFreeError from error
        return value.to("meta") if isinstance(value, Tensor) else value  # a new tensor may have asked for the processor

    def _located(self, node: fx.Node, value: Any) -> Any:
        """A node's value, the images in it found: they are the one dimension whose size is not the recorded one."""
        source = self._source(node)
        if not isinstance(value, Tensor) or not is_tensor(node):
            if source is not None:
                self.spots[node] = self.spots[source]
            return value
        recorded = shape_of(node)
        if len(recorded) != value.dim():
            raise NotFreeError
        axes = [axis for axis, size in enumerate(value.shape) if size != recorded[axis]]
        if len(axes) > 1 or (axes and value.shape[axes[0]] * self.batch != recorded[axes[0]] * OTHER):
            raise NotFreeError
        if axes:
            self.spots[node] = _Spot(axes[0], self._outer(node, axes[0], source))
        return value

    def _outer(self, node: fx.Node, axis: int, source: fx.Node | None) -> int:
        if source is None:
            return 1
        if node.target not in ORDER_KEPT:
            return self.spots[source].outer
        ahead = math.prod(shape_of(node)[:axis])
        return max(1, self._before(source) // ahead)

    def _source(self, node: fx.Node) -> fx.Node | None:
        return next((one for one in node.all_input_nodes if one in self.spots and is_tensor(one)), None)

    def _before(self, node: fx.Node) -> int:
        """How many rows come before the images in a batched tensor's row-major order."""
        spot = self.spots[node]
        ahead = math.prod(shape_of(node)[: spot.axis])
        return ahead * spot.outer

    def _rewrite_sizes(self, node: fx.Node) -> None:
        target, source = node.target, self._source(node)
        if target in RESHAPES and source is not None:
            self._reshape(node, source, 1, 0)
        elif target is aten.unflatten.int and source is not None:
            self._reshape(node, source, 2, _axis(node, source))
        elif target is aten.expand.default and source is not None:
            self._expand(node, source)
        elif target is aten.cat.default and source is not None:
            self._join(node, source)
        elif self.repeats and source is None:
            self._repeat(node)

    def _reshape(self, node: fx.Node, source: fx.Node, position: int, start: int) -> None:
        """Make the size that holds the images a multiple of the batch; `start` is the first dimension of the sizes."""
        axis = self._holder(shape_of(node), source)
        sizes = _sizes(node, position)
        if 0 <= axis - start < len(sizes) and isinstance(sizes[axis - start], int) and sizes[axis - start] != -1:
            sizes[axis - start] = self._multiple(shape_of(node)[axis] // self.batch)
            node.update_arg(position, sizes)

    def _holder(self, sizes: Sequence[int], source: fx.Node) -> int:
        """The dimension in which the images of `source` lie once it is reshaped to `sizes`.

        Where several could hold them, it is one ahead of the trailing sizes that stay as they are and of the last one,
        which is for features, and rather one that the images begin than one they end.
        """
        before = self._before(source)
        ahead: list[int] = [math.prod(sizes[:axis]) for axis in range(len(sizes))]
        holds = [
            axis
            for axis, (rows, size) in enumerate(zip(ahead, sizes, strict=True))
            if before % rows == 0 and rows * size % (before * self.batch) == 0
        ]
        kept = _common_end(sizes, shape_of(source)[self.spots[source].axis + 1 :])
        likely = [axis for axis in holds if axis < len(sizes) - max(kept, 1)] or holds
        exact = [axis for axis in likely if ahead[axis] == before] or likely
        if not exact:
            raise NotFreeError
        return exact[0]

    def _expand(self, node: fx.Node, source: fx.Node) -> None:
        sizes = _sizes(node, 1)
        added = len(sizes) - len(shape_of(source))
        sizes[self.spots[source].axis + added] = -1  # as many as the source has
        node.update_arg(1, sizes)

    def _repeat(self, node: fx.Node) -> None:
        """Tie a constant's first dimension to the batch, where it is made as long as the batch by this node."""
        position = SIZES_AT.get(node.target)
        if position is None:
            return
        sizes = _sizes(node, position)
        long_already = node.target in REPEATS and self._leads_alone(node, len(sizes))
        if sizes and sizes[0] == self.batch and not long_already:
            node.update_arg(position, [self._multiple(1), *sizes[1:]])

    def _leads_alone(self, node: fx.Node, rank: int) -> bool:
        shape = shape_of(node.all_input_nodes[0])
        return len(shape) == rank and shape[0] != 1

    def _join(self, node: fx.Node, source: fx.Node) -> None:
        """Repeat a constant that is joined to batched tensors, where all its rows along the batch are one."""
        axis = self.spots[source].axis
        parts = [part if part in self.spots else self._widened(node, part, axis) for part in _sizes(node, 0)]
        node.update_arg(0, parts)

    def _widened(self, node: fx.Node, part: fx.Node, axis: int) -> fx.Node:
        shape = shape_of(part)
        if shape[axis] != self.batch:
            return part
        sizes: list[Any] = [-1] * len(shape)
        sizes[axis] = self._multiple(1)
        with self.graph.inserting_before(node):
            if shape[axis] != 1:
                part = self._first_row(part, axis)
            wide = self.graph.call_function(aten.expand.default, (part, sizes))
        set_notes(wide, Notes(tuple(shape), notes(part).dtype))
        self.values[wide] = self._located(wide, self._rewritten(wide, self.values))
        return wide

    def _first_row(self, part: fx.Node, axis: int) -> fx.Node:
        if part.op != "get_attr":
            raise NotFreeError
        tensor = tensor_of(self.module, part)
        row = tensor.narrow(axis, 0, 1)
        if not torch.equal(tensor, row.expand_as(tensor)):
            raise NotFreeError
        node = self.graph.call_function(aten.slice.Tensor, (part, axis, 0, 1))
        note_value(node, row)
        self.values[node] = row.to("meta")
        return node

    def _multiple(self, factor: int) -> fx.Node:
        """The node of `factor` x the batch size."""
        if factor not in self._symbols:
            if factor == 1:
                with self.graph.inserting_after(self.images):
                    node = self.graph.call_function(aten.sym_size.int, (self.images, 0))
            else:
                with self.graph.inserting_after(self._multiple(1)):
                    node = self.graph.call_function(operator.mul, (self._multiple(1), factor))
            self.values[node] = factor * OTHER
            self._symbols[factor] = node
        return self._symbols[factor]


def _sizes(node: fx.Node, position: int) -> list[Any]:
    """A list among the arguments of a call."""
    value: Any = node.args[position]
    return list(value)


def _axis(node: fx.Node, source: fx.Node) -> int:
    """The axis that a call takes after its tensor, counted from the front."""
    axis: Any = node.args[1]
    return int(axis) % len(shape_of(source))


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many sizes two shapes have in common, counted from their ends."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
