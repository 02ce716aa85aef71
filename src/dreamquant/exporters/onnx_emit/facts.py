"""What is known of every node of a graph before it is written: shapes, dtypes, and the values that are constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.network.graph import is_input
from dreamquant.network.interpreter import interpret

PROBES = (2, 3)  # batch sizes; a dimension that differs between them depends on the batch


@dataclass(frozen=True)
class Fact:
    """One node, of `kind` "tensor", "tuple" or "number".

    `shape` has None where a dimension depends on the batch; `leading` says that the first one is the batch itself.
    `value` is what a node computes that does not depend on the images, None for others; `stored` says that such a node
    is a stored tensor or is computed from one.
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None
    leading: bool = False
    stored: bool = False


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(_meta(item) for item in value) if isinstance(value, tuple | list) else value


def probe(graph: fx.GraphModule, input_shape: tuple[int, int, int], batch: int | None) -> dict[fx.Node, Fact]:
    """Run `graph` on images (n, C, H, W) of zeros, n = `batch` or two sizes if None, and compare what was seen.

    Raises `ModelError` where the graph does not run on them.
    """
    sizes = PROBES if batch is None else (batch, batch)
    first = _run(graph, input_shape, sizes[0])
    other = first if batch is not None else _run(graph, input_shape, sizes[1])
    facts: dict[fx.Node, Fact] = {}
    varying: set[fx.Node] = set()
    for node, one in first.items():
        parents = node.all_input_nodes
        if is_input(node) or any(parent in varying for parent in parents):
            varying.add(node)
        stored = node.op == "get_attr" or any(facts[parent].stored for parent in parents)
        facts[node] = _fact(one, other[node], node in varying, stored, sizes)
        if facts[node].kind == "number" and facts[node].value is not None:
            varying.discard(node)
    return facts


def _run(graph: fx.GraphModule, input_shape: tuple[int, int, int], size: int) -> dict[fx.Node, Any]:
    """Every shape, every number, and the values that may be constants."""
    device = next((tensor.device for tensor in graph.state_dict().values()), torch.device("cpu"))
    seen: dict[fx.Node, Any] = {}
    varying: set[fx.Node] = set()

    def after(node: fx.Node, value: Any) -> Any:
        varies = is_input(node) or any(parent in varying for parent in node.all_input_nodes)
        if varies and isinstance(value, Tensor | tuple | list):
            varying.add(node)
        seen[node] = _meta(value) if node in varying else value
        return value

    try:
        with torch.no_grad():
            interpret(graph, torch.zeros(size, *input_shape, device=device), after=after)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the graph cannot run {size} images of shape {input_shape}: {reason}") from error
    return seen


def _fact(one: Any, other: Any, varying: bool, stored: bool, sizes: tuple[int, int]) -> Fact:
    if isinstance(one, Tensor):
        shape = tuple(a if a == b else None for a, b in zip(one.shape, other.shape, strict=True))
        leading = bool(shape) and (one.shape[0], other.shape[0]) == sizes
        return Fact("tensor", shape, one.dtype, None if varying else one, leading, stored)
    if isinstance(one, tuple | list):
        return Fact("tuple", value=None if varying else tuple(one), stored=stored)
    return Fact("number", value=one if one == other else None)
