"""What is left of an ONNX graph where sizes depend on values: it goes out as it came in, behind the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import helper
from torch import fx

from dreamquant.network.onnx_import.builder import Builder


def ends_of(builder: Builder, graph: onnx.GraphProto) -> list[str]:
    """The outputs that are computed and, in place of those that are not, the values that the nodes left behind read for them.

    One number for the whole batch is left to the file where there is another output.
    """
    found: dict[str, None] = {}
    numbers = {output.name for output in graph.output if is_one_number(builder, output.name)}
    for output in graph.output:
        if output.name in numbers and len(numbers) < len(graph.output):
            continue
        behind = _needed(builder.tail, [output.name])
        read = [name for node in behind for name in node.input if isinstance(builder.values.get(name), fx.Node)]
        found.update(dict.fromkeys(read if behind else [output.name]))
    return list(found)


def is_one_number(builder: Builder, name: str) -> bool:
    """Whether a value depends on the images and is one number."""
    value = builder.values.get(name)
    return isinstance(value, fx.Node) and builder.shape(value) == ()


def tail_of(proto: onnx.ModelProto, ends: Sequence[str]) -> onnx.ModelProto | None:
    """What is left of a model behind the values `ends`, as a model of its own."""
    graph = proto.graph
    nodes = _needed(graph.node, [output.name for output in graph.output], ends)
    if not nodes:
        return None
    read, made = {name for node in nodes for name in node.input}, {name for node in nodes for name in node.output}
    stored = [tensor for tensor in graph.initializer if tensor.name in read]
    open_names = sorted(read - made - {tensor.name for tensor in stored} - {""})
    inputs = [helper.make_value_info(name, onnx.TypeProto()) for name in open_names]
    rest = helper.make_graph(nodes, "tail", inputs, graph.output, stored)
    return helper.make_model(rest, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], ends: Iterable[str] = ()) -> list[onnx.NodeProto]:
    """The nodes that outputs are computed by, from `ends`, in order."""
    given, found = set(ends), []
    wanted = set(outputs) - given
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(set(node.input) - given)
            found.append(node)
    return found[::-1]
