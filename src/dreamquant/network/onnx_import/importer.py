"""The walk over an ONNX graph's nodes, in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from torch import fx

from dreamquant.errors import ModelError, UnsupportedOperator, blamed
from dreamquant.limits import check_memory
from dreamquant.network.batch import TRIED, free_batch
from dreamquant.network.front import take_channels_first
from dreamquant.network.graph import input_node
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.live import check_trial
from dreamquant.network.notes import notes, set_notes
from dreamquant.network.onnx_import.builder import OPERATORS, Array, Builder, Known, Op, label
from dreamquant.network.onnx_import.interface import ImageInput, image_input

ANY_BATCH = 2  # the batch size at which a file of free batch size is imported

LOWEST_OPSET = 11
_SHAPE_VALUES = 64  # a constant of more elements is no shape, and its values matter to no arithmetic of shapes
_WIDEST = 8  # bytes of an element

QUANTIZED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
}

NEVER_FOLDED = {"Loop", "Scan", "Bernoulli", "Multinomial"}
NEVER_FOLDED |= {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
KEPT_WHEN_KNOWN = {"Identity", "Dropout", "Expand", "Shape", "Size"}  # read by their own function, not by folding


def import_onnx(
    proto: onnx.ModelProto, *, name: str, input_shape: tuple[int, int, int] | None = None, layout: str | None = None
) -> tuple[fx.GraphModule, ImageInput, int | None]:
    """The network of an ONNX model: its graph, what goes into it, and its batch size, None for any.

    `name` is what messages call the model; `input_shape` fills in sizes that the file leaves open, `layout` says how it has
    images. The graph takes float32 images (N, C, H, W) whatever the file takes. Weights kept as
    external data must be in `proto` already. Raises ModelError where the model is not one network from images
    (N, C, H, W) in float32, and UnsupportedOperator, naming all of them, where operators have no counterpart.
    """
    opset = _opset(proto, name)
    refuse_unsupported(proto.graph, name)
    given = image_input(proto.graph, name, input_shape, layout)
    shape, batch = given.shape, given.batch or ANY_BATCH
    builder = Builder(name, opset)
    channels, height, width = shape
    with blamed(ModelError, f"{name}: cannot be imported"):
        builder.images(given.name, (batch, height, width, channels) if given.layout == "NHWC" else (batch, *shape))
        _walk(builder, proto.graph)
        graph = builder.finish([output.name for output in proto.graph.output])
    check_trial(graph, max(batch, *TRIED), name)
    with blamed(ModelError, f"{name}: cannot be run on images {shape}"):
        if given.layout == "NHWC":
            take_channels_first(graph)
            record_shapes(graph, torch.zeros(batch, *shape))
        images = input_node(graph.graph)
        set_notes(images, replace(notes(images), origin=given.inner))
        return graph, given, _freed(graph, shape, batch)


def _freed(graph: fx.GraphModule, shape: tuple[int, int, int], batch: int) -> int | None:
    """Free the graph of its batch size where that can be proven, and have its shapes those of the promised batch."""
    free = free_batch(graph, shape, batch)
    if free is None and batch != ANY_BATCH:
        record_shapes(graph, torch.zeros(ANY_BATCH, *shape))
    return free


def _opset(proto: onnx.ModelProto, name: str) -> int:
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < LOWEST_OPSET:
        raise ModelError(
            f"{name}: written in opset {opset}; opset {LOWEST_OPSET} and newer are read "
            "(onnx.version_converter.convert_version can raise it)"
        )
    return opset


def _array(tensor: onnx.TensorProto, name: str) -> Array:
    with blamed(ModelError, f"{name}: tensor {tensor.name!r} cannot be read"):
        return numpy_helper.to_array(tensor)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def refuse_unsupported(graph: onnx.GraphProto, name: str) -> None:
    """Raise UnsupportedOperator, or ModelError for a network that is quantized already, before anything is built."""
    missing: dict[str, list[str]] = {}
    _collect_unsupported(graph, name, {""}, missing)
    if missing:
        raise UnsupportedOperator(f"{name}: operator {'; also '.join(_missing(missing))}")


def _collect_unsupported(graph: onnx.GraphProto, name: str, known: set[str], missing: dict[str, list[str]]) -> None:
    known.update(tensor.name for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type in QUANTIZED or node.op_type.startswith("QLinear"):
            raise ModelError(f"{name}: is already quantized (node {label(node)!r} is a {node.op_type})")
        if node.op_type == "If" and _is_standard(node):
            for attribute in node.attribute:
                _collect_unsupported(attribute.g, name, set(known), missing)
            continue
        foldable = _is_standard(node) and node.op_type not in NEVER_FOLDED and known.issuperset(node.input)
        if foldable or (_is_standard(node) and node.op_type in ("Shape", "Size")):
            known.update(node.output)
        elif not _is_standard(node) or node.op_type not in OPERATORS:
            missing.setdefault(_title(node), []).append(label(node))


def _title(node: onnx.NodeProto) -> str:
    return node.op_type if _is_standard(node) else f"{node.op_type} (domain {node.domain})"


def _missing(missing: dict[str, list[str]]) -> Iterator[str]:
    verb = " is not supported"
    for title, labels in missing.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        yield f"{title}{verb}: node {labels[0]!r}{more}"
        verb = ""


def _walk(builder: Builder, graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        builder.keep(tensor.name, Known(tensor.name, _array(tensor, builder.model)))
    for node in graph.node:
        _add(builder, node)


def _take_branch(builder: Builder, node: onnx.NodeProto) -> list[fx.Node | Known]:
    """The outputs of an If whose condition is known: of the one branch that is taken."""
    op = Op(builder, node)
    branch = op.attribute("then_branch" if bool(op.known(0)) else "else_branch")
    _walk(builder, branch)
    return [builder.values[output.name] for output in branch.output]


def _add(builder: Builder, node: onnx.NodeProto) -> None:
    """Import one node: run it where all its inputs are known, else add its counterpart to the graph."""
    inputs = [builder.values.get(name) for name in node.input if name]
    if None in inputs:
        lost = next(name for name in node.input if name and name not in builder.values)
        raise ModelError(f"{builder.model}: node {label(node)!r} ({node.op_type}) reads {lost!r}, which nothing computes")
    if node.op_type == "If":
        results = _take_branch(builder, node)
    elif node.op_type not in KEPT_WHEN_KNOWN and all(isinstance(value, Known) for value in inputs):
        results = _fold(builder, node)
    else:
        result = _converted(builder, node)
        results = result if isinstance(result, list) else [result]
    for name, value in zip(node.output, results, strict=False):
        builder.keep(name, value)
        if isinstance(value, fx.Node) and value.op == "call_function" and notes(value).origin is None:
            set_notes(value, replace(notes(value), origin=name))


def _converted(builder: Builder, node: onnx.NodeProto) -> fx.Node | Known | list[fx.Node | Known]:
    with blamed(ModelError, f"{builder.model}: node {label(node)!r} ({node.op_type}) cannot be imported"):
        return OPERATORS[node.op_type](Op(builder, node))  # type: ignore[no-any-return]


def _fold(builder: Builder, node: onnx.NodeProto) -> list[fx.Node | Known]:
    """The outputs of a node whose inputs are all known, from ONNX's reference implementation."""
    if node.op_type == "Constant" and [attribute.name for attribute in node.attribute] == ["value"]:
        return [Known(node.output[0], _array(node.attribute[0].t, builder.model))]
    feeds = {name: builder.values[name].array for name in node.input if name}  # type: ignore[union-attr]
    infos = [_info(name, array) for name, array in feeds.items()]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", infos, outputs)
    what = f"{builder.model}: node {label(node)!r} ({node.op_type})"
    with blamed(UnsupportedOperator, f"{what} has constant inputs but cannot be computed"), np.errstate(all="ignore"):
        check_memory(_folded_bytes(graph, feeds, builder.opset), what, ModelError)
        results = ReferenceEvaluator(graph, opsets={"": builder.opset}).run(None, feeds)
    arrays = iter(results)
    return [Known(name, np.asarray(next(arrays) if name else 0)) for name in node.output]


def _folded_bytes(graph: onnx.GraphProto, feeds: dict[str, Array], opset: int) -> int:
    """What the outputs of one node on constants will take, by ONNX's own arithmetic of shapes; 0 where it tells nothing."""
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    small = [numpy_helper.from_array(array, name) for name, array in feeds.items() if array.size <= _SHAPE_VALUES]
    proto.graph.initializer.extend(small)
    told = shape_inference.infer_shapes(proto, data_prop=True)
    shapes = [entry.type.tensor_type for entry in told.graph.output]
    return sum(_WIDEST * math.prod(dim.dim_value for dim in shape.shape.dim) for shape in shapes if shape.HasField("shape"))


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
