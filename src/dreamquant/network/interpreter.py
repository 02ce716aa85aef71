"""Graphs run node by node, with a say in what each node gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.graph import device_of, is_input, tensor_of
from dreamquant.network.notes import note_value

Values = dict[fx.Node, Any]
Step = Callable[[fx.Node, Values], Any]
After = Callable[[fx.Node, Any], Any]


def call(node: fx.Node, values: Mapping[fx.Node, Any], target: Any = None) -> Any:
    """What an operation, or `target` in its place, makes of `values` in place of the nodes that it reads."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    function: Any = node.target if target is None else target
    return function(*args, **kwargs)


def compute(graph: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What any node but the input gives, from the values of those that it reads."""
    if node.op == "get_attr":
        return tensor_of(graph, node)
    if node.op == "output":
        return fx.node.map_arg(node.args[0], values.__getitem__)
    return call(node, values, graph.get_submodule(str(node.target)) if node.op == "call_module" else None)


def interpret(
    graph: fx.GraphModule,
    images: Any,
    *,
    step: Step | None = None,
    after: After | None = None,
    values: Values | None = None,
    nodes: Sequence[fx.Node] | None = None,
    keep: bool = False,
) -> Any:
    """Run a graph on images, node by node; returns what its last node gives, the output.

    `step(node, values)` gives a node's value, of whatever type it reads in `values`, by default what the node computes;
    `after(node, value)` gives what is put in its place, that of the input too. Nodes that are in `values` already, or are put
    there by a step, are not run. Values are dropped after their last use, but for `keep`: then `values` has them all in the end.
    `nodes` are those that are run, in this order, by default all.
    """
    nodes = tuple(graph.graph.nodes) if nodes is None else nodes
    values = {} if values is None else values
    step = step or partial(compute, graph)
    last_use = {argument: node for node in nodes for argument in node.all_input_nodes}
    for node in nodes:
        if node not in values:
            found = images if is_input(node) else step(node, values)
            values[node] = found if after is None else after(node, found)
            del found  # it may be the last that holds a tensor
        for argument in () if keep else node.all_input_nodes:
            if last_use[argument] is node:
                values.pop(argument, None)
    return values[nodes[-1]]


def record_shapes(graph: fx.GraphModule, images: Tensor) -> None:
    """Note shape and number type of every tensor-valued node, as seen when running `images`."""
    with torch.no_grad():
        interpret(graph, images.to(device_of(graph)), after=note_value)
