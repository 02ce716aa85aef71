"""What is computed from stored tensors alone is stored: a weight that is normalised, scaled, sliced or summed is a weight."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.edit import add_tensor
from dreamquant.network.front import constants
from dreamquant.network.graph import tensor_of
from dreamquant.network.interpreter import compute
from dreamquant.network.notes import Notes, notes

PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\..*")  # where torch keeps what a parameter is computed from


def fold_constants(graph: fx.GraphModule) -> None:
    """Store all that does not depend on the images, in place, under the name of what it was computed from.

    A number that is read from a stored tensor stands as it is; what is computed twice is stored once.
    """
    fixed = constants(graph.graph)
    values: dict[fx.Node, Any] = {}
    origins: dict[fx.Node, list[str]] = {}
    stored: dict[str, list[fx.Node]] = {}
    for node in list(graph.graph.nodes):
        if node not in fixed or node.op in ("output", "call_module"):
            continue
        with torch.no_grad():
            values[node] = compute(graph, node, values)
        own = [notes(node).origin or str(node.target)] if node.op == "get_attr" else []
        origins[node] = own + [name for source in node.all_input_nodes for name in origins[source]]
        readers = [user for user in node.users if user not in fixed or user.op == "output"]
        if node.op != "get_attr" and readers and isinstance(values[node], bool | int | float | Tensor):
            put = _put(graph, node, values[node], _origin(origins[node]) or node.name, stored)
            for reader in readers:
                _replace(reader, node, put)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _put(graph: fx.GraphModule, node: fx.Node, value: Any, origin: str, stored: dict[str, list[fx.Node]]) -> Any:
    """What stands in for a node: its number, or a node that reads its tensor."""
    if not isinstance(value, Tensor):
        return value
    known = stored.setdefault(origin, [])
    for one in known:
        kept = tensor_of(graph, one)
        if kept.shape == value.shape and kept.dtype == value.dtype and torch.equal(kept, value):
            return one
    known.append(add_tensor(graph, origin, value, Notes(origin=origin), before=node))
    return known[-1]


def _replace(reader: fx.Node, node: fx.Node, put: Any) -> None:
    args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda one: put if one is node else one)
    reader.args, reader.kwargs = args, kwargs


def _origin(names: list[str]) -> str:
    """What the names of all that a tensor was computed from have in common."""
    plain = [PARAMETRIZED.sub(r"\1", name) for name in names]
    return os.path.commonprefix(plain).rstrip("._")  # noqa: RUF071 - weight_g and weight_v make up weight
