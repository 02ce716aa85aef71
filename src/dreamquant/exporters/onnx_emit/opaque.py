"""Operators of an ONNX file without a counterpart, written as they were read."""

from __future__ import annotations

from onnx import numpy_helper

from dreamquant.errors import UnsupportedOperator
from dreamquant.exporters.onnx_emit.builder import Builder, Value, emits, refuse
from dreamquant.network.onnx_import.standard import lifted, opset_of
from dreamquant.network.opaque import model_of, onnx_node


@emits(onnx_node)
def kept(g: Builder, text: str, *inputs: Value) -> list[str | None] | str:
    model = model_of(text)
    if opset_of(model) != g.opset:
        try:
            model = lifted(model, g.opset, "it")
        except UnsupportedOperator as error:
            refuse(str(error))
    graph = model.graph
    names = {entry.name: value.name for entry, value in zip(graph.input, inputs, strict=True)}
    for tensor in graph.initializer:
        names[tensor.name] = g.unique(f"{g.result_name}/{tensor.name}")
        g.initializers.append(numpy_helper.from_array(numpy_helper.to_array(tensor), names[tensor.name]))
    for node in graph.node:
        names |= {name: g.unique(f"{g.result_name}/{node.op_type}") for name in node.output if name}
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.name = f"{g.current.name}/{node.op_type}"
        g.nodes.append(node)
    results: list[str | None] = [names[output.name] for output in graph.output]
    return results if len(results) > 1 else names[graph.output[0].name]
