"""The inner float graph as a standard ONNX model.

    proto = emit_network(network)

Operators are written by small functions in the modules beside this one, entered into one table with `@emits(...)`; the
forms are those that ONNX Runtime recognises around QuantizeLinear and DequantizeLinear. What is made of numbers only
(`arange`, masks) becomes the constant that it computes, and so does an operator on stored tensors without an ONNX form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import helper
from torch import fx

from dreamquant.errors import OptionError, UnsupportedOperator
from dreamquant.exporters.onnx_emit import (  # noqa: F401 - each fills the table
    activations,
    arithmetic,
    layers,
    norms,
    opaque,
    pooling,
    reductions,
    shapes,
    slicing,
)
from dreamquant.exporters.onnx_emit.builder import DTYPES, Builder, Refused
from dreamquant.exporters.onnx_emit.facts import Fact, probe
from dreamquant.exporters.onnx_emit.front import take_as_fed
from dreamquant.exporters.onnx_emit.naming import value_names
from dreamquant.exporters.onnx_emit.writer import stand_in, write
from dreamquant.network.graph import Network, input_node, is_input, needed_by, output_nodes
from dreamquant.network.notes import notes, set_notes
from dreamquant.network.onnx_import.standard import opset_of
from dreamquant.network.opaque import is_opaque, model_of

OPSETS = range(13, 23)
OPSET = 17  # where nothing asks for another
BATCH = "N"

__all__ = ["OPSETS", "emit", "emit_network", "newest_opset"]


def emit(
    graph: fx.GraphModule,
    *,
    input_shape: tuple[int, int, int],
    batch: int | None,
    opset: int = OPSET,
    name: str = "network",
) -> onnx.ModelProto:
    """The ONNX model of a flat ATen graph (see `network.graph`), from images (N, C, H, W) to its outputs.

    `input_shape` is (C, H, W), `batch` the only batch size of the graph, None for any (the dimension "N"). Every tensor
    of the graph that the outputs need becomes one ONNX value, and `origin` of its node's notes is set to that value's
    name; an origin that is there already is kept as the name where it is free. Linear layers on other than two
    dimensions become MatMul on a weight stored (in, out): that `get_attr` is noted as `transposed`.

    Raises `UnsupportedOperator` naming all operators that cannot be written, `OptionError` for an opset outside 13..22,
    `ModelError` for a graph that does not run on such images.
    """
    if opset not in OPSETS:
        raise OptionError(f"opset {opset} cannot be written (known: {OPSETS[0]} to {OPSETS[-1]})")
    builder = Builder(opset, probe(graph, input_shape, batch))
    live = needed_by(output_nodes(graph.graph)) | {input_node(graph.graph)}
    names = value_names(graph.graph, live, builder)
    failed: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node in live:
            try:
                write(builder, graph, node, names)
            except Refused as reason:
                failed[node] = str(reason)
                stand_in(builder, node, names)
    if failed:
        raise UnsupportedOperator(_complaint(failed))
    outputs = _outputs(builder, graph.graph)
    _drop_unused(builder, outputs)
    _record_names(builder, graph.graph)
    return _model(builder, graph.graph, outputs, name)


def emit_network(network: Network, graph: fx.GraphModule | None = None, *, opset: int = OPSET) -> onnx.ModelProto:
    """The ONNX model of a network, or of another graph in its place, that takes images as the network's own file or module
    does."""
    inner = network.graph if graph is None else graph
    proto = emit(inner, input_shape=network.input_shape, batch=network.batch, opset=opset)
    take_as_fed(proto, network.space, input_node(inner.graph))
    return proto


def newest_opset(network: Network) -> int:
    """The opset to write a network in: ours, or that of what stays of its file as it is."""
    kept = [model_of(str(node.args[0])) for node in network.graph.graph.nodes if is_opaque(node)]
    return max([OPSET, *map(opset_of, [*kept, *([network.source.tail] if network.source.tail else [])])])


def _complaint(failed: dict[fx.Node, str]) -> str:
    """All operators that could not be written, each with its first node, its count and the reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node, reason in failed.items():
        groups.setdefault((str(node.target), reason), []).append(node.name)
    items = [
        f"{target} (node {nodes[0]}{f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''}): {reason}"
        for (target, reason), nodes in groups.items()
    ]
    count = "1 node" if len(failed) == 1 else f"{len(failed)} nodes"
    return f"{count} of the graph cannot be written as ONNX: {'; '.join(items)}"


def _outputs(builder: Builder, graph: fx.Graph) -> list[tuple[str, Fact]]:
    """Names and facts of the model's outputs; what no node computes, or comes twice, goes through an Identity."""
    outputs: list[tuple[str, Fact]] = []
    nodes = output_nodes(graph)
    for index, node in enumerate(nodes):
        name = builder.values[node].name
        if node.op != "call_function" or any(name == other for other, _ in outputs) or builder.is_constant(name):
            copy = builder.unique("output" if len(nodes) == 1 else f"output_{index}")
            builder.nodes.append(helper.make_node("Identity", [name], [copy], name=copy))
            name = copy
        outputs.append((name, builder.facts[node]))
    return outputs


def _drop_unused(builder: Builder, outputs: Sequence[tuple[str, Fact]]) -> None:
    """Remove the stored tensors that only went into constants."""
    used = {name for node in builder.nodes for name in node.input} | {name for name, _ in outputs}
    builder.initializers = [tensor for tensor in builder.initializers if tensor.name in used]


def _record_names(builder: Builder, graph: fx.Graph) -> None:
    """Tell every node what its value is called in the model; those that have none there carry no name."""
    present = {tensor.name for tensor in builder.initializers} | {name for node in builder.nodes for name in node.output}
    for node in graph.nodes:
        value = builder.values.get(node)
        written = value if value is not None and (is_input(node) or value.name in present) else None
        origin, transposed = (None, False) if written is None else (written.name, written.transposed)
        set_notes(node, replace(notes(node), origin=origin, transposed=transposed))


def _model(builder: Builder, graph: fx.Graph, outputs: Sequence[tuple[str, Fact]], name: str) -> onnx.ModelProto:
    values = [(value.name, builder.facts[node]) for node, value in builder.values.items() if node.op == "call_function"]
    ends = {name for name, _ in outputs}
    image = input_node(graph)
    proto = helper.make_graph(
        builder.nodes,
        name,
        [_info(builder.values[image].name, builder.facts[image])],
        [_info(*output) for output in outputs],
        builder.initializers,
        value_info=[_info(*value) for value in values if value[0] not in ends and not builder.is_constant(value[0])],
    )
    imports = [helper.make_opsetid("", builder.opset)]
    version = helper.find_min_ir_version_for(imports)
    imports += [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in builder.nodes} - {"", "ai.onnx"})]
    return helper.make_model(proto, opset_imports=imports, ir_version=version, producer_name="dreamquant")


def _info(name: str, fact: Fact) -> onnx.ValueInfoProto:
    assert fact.dtype is not None
    shape: list[int | str | None] = list(fact.shape)
    if fact.leading and shape[0] is None:
        shape[0] = BATCH
    return helper.make_tensor_value_info(name, DTYPES[fact.dtype], shape)
