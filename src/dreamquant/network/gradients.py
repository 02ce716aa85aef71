"""Gradients of what a graph answers, at many of its inner values, in the memory of a stretch of it.

A run backward needs every value of the run forward. Where they take more memory than there is, only those that pass from one
stretch of nodes to another are kept, and the rest is computed a second time when the gradient arrives there (Chen et al.,
Training Deep Nets with Sublinear Memory Cost, 2016). No gradient is kept once it was looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.front import constants
from dreamquant.network.graph import input_node
from dreamquant.network.interpreter import Values, interpret
from dreamquant.network.live import live_bytes, value_bytes
from dreamquant.network.notes import shape_of

Stretch = tuple[fx.Node, ...]
Asked = Callable[[Any, Mapping[fx.Node, Tensor]], Sequence[Tensor]]
Look = Callable[[fx.Node, Tensor, Tensor], None]  # (a node, its value, the gradient there)


def stretches(graph: fx.Graph, images: int, size: int) -> list[Stretch]:
    """The nodes of a graph, in order, in stretches whose values on so many images take about `size` bytes.

    They take more where so many values would then pass between stretches that memory held more in all. None ends between a node
    that gives several tensors and those that take one of them.
    """
    found: list[list[fx.Node]] = [[]]
    taken, awaited = 0, set[fx.Node]()
    recorded = shape_of(input_node(graph))[0]
    whole, passing = (images * each // recorded for each in (sum(map(value_bytes, graph.nodes)), live_bytes(graph)))
    size = max(size, math.isqrt(whole * passing)) if whole > size else whole
    for node in graph.nodes:
        if taken > size and not awaited and node.op != "output":
            found.append([])
            taken = 0
        found[-1].append(node)
        taken += value_bytes(node) * images // recorded
        awaited.discard(node)
        awaited.update(user for user in node.users if user.target is operator.getitem)
    return [tuple(nodes) for nodes in found]


def look_at_gradients(
    graph: fx.GraphModule,
    images: Tensor,
    nodes: Collection[fx.Node],
    asked: Asked,
    look: Look,
    *,
    ends: Collection[fx.Node] = (),
    size: int,
) -> int:
    """Show `look` the gradient that each of the scalars `asked` has at each of `nodes`, one after the other; returns how many
    scalars there are.

    `asked(result, values)` makes them of what the graph returns on images (N, C, H, W) and of the values of `ends`. The graph is
    run in stretches of `size` bytes, or, where there are `ends`, in one. Nodes that a scalar does not depend on are not shown.
    """
    parts = [tuple(graph.graph.nodes)] if ends else stretches(graph.graph, len(images), size)
    place = {node: number for number, part in enumerate(parts) for node in part}
    entering = [{source for node in part for source in node.all_input_nodes if place[source] < place[node]} for part in parts]
    passing = _passing(graph, images, parts, entering)
    scalars, wanted = 0, list[dict[fx.Node, Tensor]]()  # by scalar, the gradients at what passes on from stretches to come
    for number in reversed(range(len(parts))):
        stretch = _Stretch(graph, images, parts[number], {node: passing[node] for node in entering[number]}, nodes, ends, look)
        if number == len(parts) - 1:
            roots = [[(scalar, torch.ones_like(scalar))] for scalar in asked(stretch.result, stretch.ends)]
            scalars, wanted = len(roots), [{} for _ in roots]
        else:
            roots = [[(stretch.inside[node], found.pop(node)) for node in parts[number] if node in found] for found in wanted]
        for index, found in enumerate(wanted):
            for node, gradient in stretch.back(roots[index], last=index == scalars - 1).items():
                found[node] = found[node] + gradient if node in found else gradient
        roots.clear()
        stretch.close()
        passing = {node: value for node, value in passing.items() if place[node] < number}
    return scalars


def _passing(graph: fx.GraphModule, images: Tensor, parts: Sequence[Stretch], entering: Sequence[set[fx.Node]]) -> Values:
    """The values that pass from one stretch to others."""
    wanted, found = set[fx.Node]().union(*entering), dict[fx.Node, Any]()

    def after(node: fx.Node, value: Any) -> Any:
        if node in wanted:
            found[node] = value
        return value

    with torch.no_grad():
        for part, border in zip(parts[:-1], entering, strict=False):
            interpret(graph, images, values={node: found[node] for node in border}, nodes=part, after=after)
    return found


class _Stretch:
    """A stretch of nodes, run forward from what enters it, so that gradients can come back."""

    def __init__(
        self,
        graph: fx.GraphModule,
        images: Tensor,
        part: Stretch,
        entering: Values,
        nodes: Collection[fx.Node],
        ends: Collection[fx.Node],
        look: Look,
    ) -> None:
        self._leaves: dict[fx.Node, Tensor] = {}  # where gradients leave, or begin
        self._own: set[fx.Node] = set()
        self._look = look
        self._hooks: list[Any] = []
        self.inside: dict[fx.Node, Tensor] = {}
        self.ends: dict[fx.Node, Tensor] = {}
        fixed = constants(graph.graph)
        for node, value in entering.items():
            if node not in fixed and isinstance(value, Tensor) and value.is_floating_point():
                entering[node] = self._leaves[node] = value.detach().requires_grad_()

        def after(node: fx.Node, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if node in nodes and not value.requires_grad:
                value = self._leaves[node] = value.detach().requires_grad_()
                self._own.add(node)
            elif node in nodes:
                at: Any = value
                self._hooks.append(at.register_hook(lambda gradient: look(node, self.inside[node].detach(), gradient)))
            if node in ends:
                self.ends[node] = value
            if node in nodes or any(user not in members for user in node.users):
                self.inside[node] = value
            return value

        members = set(part)
        with torch.enable_grad():
            self.result = interpret(graph, images, values=entering, nodes=part, after=after)

    def back(self, roots: Sequence[tuple[Tensor, Tensor]], *, last: bool) -> dict[fx.Node, Tensor]:
        """The gradients at what entered, from those at the `roots`; those at the nodes that are looked at are shown."""
        followed = [(root, gradient) for root, gradient in roots if root.requires_grad]
        if not followed or not self._leaves:
            return {}
        ends, given = zip(*followed, strict=True)
        gradients = torch.autograd.grad(ends, list(self._leaves.values()), given, retain_graph=not last, allow_unused=True)
        found = {node: gradient for node, gradient in zip(self._leaves, gradients, strict=True) if gradient is not None}
        for node in self._own & found.keys():
            self._look(node, self._leaves[node].detach(), found.pop(node))
        return found

    def close(self) -> None:
        """Let go of all values: what hooks hold holds the hooks."""
        for hook in self._hooks:
            hook.remove()
        self.inside.clear()
        self.result = None
