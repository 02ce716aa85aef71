"""One node of the graph into the ONNX graph: by its emitter, or as the constant that it computes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dreamquant.exporters.onnx_emit.builder import EMITTERS, Builder, Refused, Symbol, Value, refuse
from dreamquant.network.graph import aten, is_input, tensor_of

Names = dict[fx.Node, str]


def write(builder: Builder, graph: fx.GraphModule, node: fx.Node, names: Names) -> None:
    """Write `node`, so that `builder.values` has its value; raises `Refused` for what has no ONNX form."""
    fact = builder.facts[node]
    builder.begin(node, names.get(node, node.name))
    if is_input(node):
        builder.values[node] = Value(names[node], fact.shape, builder.dtype)
    elif node.op == "get_attr":
        _store(builder, graph, node, names[node])
    elif fact.kind == "number":
        return  # written where a shape needs it
    elif node not in builder.values:  # else an item of several results, written with them
        _call(builder, node, names)


def stand_in(builder: Builder, node: fx.Node, names: Names) -> None:
    """Let the nodes after one that failed be tried all the same."""
    fact = builder.facts[node]
    if fact.dtype is not None:
        builder.values[node] = Value(names[node], fact.shape, fact.dtype)
    for user in node.users:
        if fact.kind == "tuple" and user in names:
            stand_in(builder, user, names)


def _store(builder: Builder, graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    tensor = tensor_of(graph, node)
    transposed = bool(node.users) and all(_multiplies_by(builder, user, node) for user in node.users)
    builder.store(tensor.t() if transposed else tensor, name)
    builder.values[node] = Value(name, tuple(tensor.shape), tensor.dtype, tensor, transposed)


def _multiplies_by(builder: Builder, user: fx.Node, weight: fx.Node) -> bool:
    """Whether `user` is a linear layer that becomes a MatMul, and `weight` is its weight and nothing else."""
    if user.target is not aten.linear.default or user.args[1] is not weight or weight in (user.args[0], *user.args[2:]):
        return False
    source = user.args[0]
    return isinstance(source, fx.Node) and len(builder.facts[source].shape) != 2


def _call(builder: Builder, node: fx.Node, names: Names) -> None:
    fact = builder.facts[node]
    emitter = EMITTERS.get(node.target)
    if fact.value is not None and (emitter is None or not fact.stored):
        return _constant(builder, node, names)
    try:
        if emitter is None:
            refuse(f"it is not among the {len(EMITTERS)} operators known here")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda parent: _argument(builder, parent))
        _name_results(builder, node, emitter(builder, *args, **kwargs), names)
    except Refused:
        builder.abandon()
        if fact.value is None:
            raise
        _constant(builder, node, names)
    return None


def _argument(builder: Builder, parent: fx.Node) -> Any:
    """A node among the arguments of a call, as emitters see it."""
    fact = builder.facts[parent]
    if fact.kind == "number":
        return Symbol(parent) if fact.value is None else fact.value
    return builder.values[parent] if parent in builder.values else refuse(f"it takes all results of {parent.name} at once")


def _constant(builder: Builder, node: fx.Node, names: Names) -> None:
    fact = builder.facts[node]
    if fact.kind == "tensor":  # the items of several results are constants of their own
        builder.store(fact.value, names[node])
        builder.values[node] = Value(names[node], fact.shape, builder.dtype, fact.value)


def _name_results(builder: Builder, node: fx.Node, results: str | list[str | None], names: Names) -> None:
    if isinstance(results, str):
        return _finish(builder, node, results, names[node])
    for user in node.users:
        if user.target is operator.getitem and user in names:
            index = user.args[1]
            assert isinstance(index, int)
            result = results[index] or refuse(f"only its first {sum(item is not None for item in results)} results are known")
            _finish(builder, user, result, names[user])
            results[index] = names[user]
    return None


def _finish(builder: Builder, node: fx.Node, result: str, name: str) -> None:
    fact = builder.facts[node]
    builder.finish(result, name, node.name)
    builder.values[node] = Value(name, fact.shape, fact.dtype or refuse("its result is not one tensor"))
