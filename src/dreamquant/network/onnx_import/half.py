"""ONNX models in half precision -> the same in float32, with a Cast at each input and output that keeps its type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dreamquant.network.onnx_import.standard import fresh

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all its numbers in float32; itself where none are in half precision."""
    if not any(tensor.data_type == HALF for tensor in _tensors(proto.graph)) and not _ends(proto.graph):
        return proto
    widened = onnx.ModelProto()
    widened.CopyFrom(proto)
    graph = widened.graph
    for tensor in _tensors(graph):
        if tensor.data_type == HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == HALF:
                attribute.i = FLOAT
    del graph.value_info[:]
    taken = {name for node in _nodes(graph) for name in (*node.input, *node.output)}
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in stored:
            value.type.tensor_type.elem_type = FLOAT
        elif value.type.tensor_type.elem_type == HALF:
            inner = fresh(f"{value.name}_float", taken)
            _rename(graph, value.name, inner, outputs=False)
            graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], name=inner, to=FLOAT))
    for value in graph.output:
        if value.type.tensor_type.elem_type == HALF:
            inner = fresh(f"{value.name}_float", taken)
            _rename(graph, value.name, inner, outputs=True)
            graph.node.append(helper.make_node("Cast", [inner], [value.name], name=inner, to=HALF))
    return widened


def _ends(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [value for value in (*graph.input, *graph.output) if value.type.tensor_type.elem_type == HALF]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from attribute.g.initializer


def _rename(graph: onnx.GraphProto, name: str, replacement: str, *, outputs: bool) -> None:
    """Let readers of a value, and with `outputs` the node that computes it, call it otherwise."""
    for node in _nodes(graph):
        for names in (node.input, node.output) if outputs else (node.input,):
            for index, one in enumerate(names):
                if one == name:
                    names[index] = replacement
