"""The walk over an ONNX graph's nodes, in their order."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

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
from dreamquant.network.onnx_import.builder import OPERATORS, Array, Builder, Computed, Known, Op, label
from dreamquant.network.onnx_import.interface import ImageInput, image_input
from dreamquant.network.onnx_import.standard import opset_of, standard, without_axes, without_branches
from dreamquant.network.onnx_import.staying import stays
from dreamquant.network.onnx_import.tail import ends_of, tail_of
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.runtime import MICROSOFT, contributed

ANY_BATCH = 2  # the batch size at which a file of free batch size is imported

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
SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
KEPT_WHEN_KNOWN = {"Identity", "Dropout", "Expand", "Shape", "Size"}  # read by their own function, not by folding


class Imported(NamedTuple):
    """The network of an ONNX model: its graph, what goes into it, its batch size, None for any, and the `proto` that it is of.

    `ends` are the values that the graph gives: the model's outputs or, of those behind the `tail`, what that reads. The tail is
    what the last nodes of the model do, from where sizes depend on values; None where there are no such.
    """

    graph: fx.GraphModule
    given: ImageInput
    batch: int | None
    proto: onnx.ModelProto
    ends: tuple[str, ...]
    tail: onnx.ModelProto | None


def import_onnx(
    proto: onnx.ModelProto, *, name: str, input_shape: tuple[int, int, int] | None = None, layout: str | None = None
) -> Imported:
    """The network of an ONNX model.

    `name` is what messages call the model; `input_shape` fills in sizes that the file leaves open, `layout` says how it has
    images. The graph takes float32 images (N, C, H, W) whatever the file takes. Weights kept as
    external data must be in `proto` already. Raises ModelError where the model is not one network from images
    (N, C, H, W) in float32, and UnsupportedOperator, naming all of them, where operators have no counterpart and cannot stay.
    """
    refuse_unsupported(proto, name)
    proto = standard(proto, name)
    given = image_input(proto.graph, name, input_shape, layout)
    batch = given.batch or ANY_BATCH
    while any(node.op_type == "If" for node in proto.graph.node):
        with blamed(ModelError, f"{name}: cannot be imported"):
            proto = without_branches(proto, _branches(proto, name, given))
        refuse_unsupported(proto, name)
    builder = _walked(proto, name, given, batch)
    if builder.staying and not given.batch:
        other = _walked(proto, name, given, batch + 1).shapes()
        shapes = builder.shapes()
        one_for_all = {value for value in builder.staying if shapes[value] == other.get(value)}
        if one_for_all:  # as boxes are, of any image
            builder = _walked(proto, name, given, batch, leaving=one_for_all)
    _check_layers(builder, name)
    with blamed(ModelError, f"{name}: cannot be imported"):
        proto = without_axes(proto, builder.shapes(), builder.arrays())
        ends = ends_of(builder, proto.graph)
        graph = builder.finish(ends)
    check_trial(graph, max(batch, *TRIED), name)
    with blamed(ModelError, f"{name}: cannot be run on images {given.shape}"):
        if given.layout == "NHWC":
            take_channels_first(graph)
            record_shapes(graph, torch.zeros(batch, *given.shape))
        images = input_node(graph.graph)
        set_notes(images, replace(notes(images), origin=given.inner))
        return Imported(graph, given, _freed(graph, given.shape, batch), proto, tuple(ends), tail_of(proto, ends))


def _walked(proto: onnx.ModelProto, name: str, given: ImageInput, batch: int, leaving: Collection[str] = frozenset()) -> Builder:
    """All nodes of a model, imported for `batch` images, but for those that compute `leaving`."""
    builder = Builder(name, opset_of(proto))
    builder.behind.update(leaving)
    channels, height, width = given.shape
    with blamed(ModelError, f"{name}: cannot be imported"):
        builder.images(given.name, (batch, height, width, channels) if given.layout == "NHWC" else (batch, *given.shape))
        for tensor in proto.graph.initializer:
            builder.keep(tensor.name, Known(tensor.name, _array(tensor, name)))
        for node in proto.graph.node:
            _add(builder, node)
    return builder


def _check_layers(builder: Builder, name: str) -> None:
    """`UnsupportedOperator` where all layers come behind a node that had to be left behind."""
    if builder.tail and not any(is_call(node, WEIGHTED) for node in builder.graph.nodes):
        node = builder.tail[0]
        unasked = f"{name}: node {label(node)!r} ({_title(node)}): it gives no answer to each image"
        raise UnsupportedOperator(f"{builder.reasons.get(node.output[0], unasked)}; no layer comes before it")


def _branches(proto: onnx.ModelProto, name: str, given: ImageInput) -> dict[str, str]:
    """Which branch each If of a graph takes, by the If's first output: the same one for any number of images."""
    found = [
        _walked(proto, name, given, batch).branches for batch in ((given.batch,) if given.batch else (1, ANY_BATCH, TRIED[0]))
    ]
    unknown = [node for node in proto.graph.node if node.op_type == "If" and not found[0]]
    odd = [node for node in proto.graph.node if len({one.get(node.output[0]) for one in found}) > 1]
    for node, what in [*((node, "images") for node in unknown), *((node, "number of images") for node in odd)]:
        raise UnsupportedOperator(f"{name}: node {label(node)!r} (If): its condition depends on the {what}")
    return found[0]


def _freed(graph: fx.GraphModule, shape: tuple[int, int, int], batch: int) -> int | None:
    """Free the graph of its batch size where that can be proven, and have its shapes those of the promised batch."""
    free = free_batch(graph, shape, batch)
    if free is None and batch != ANY_BATCH:
        record_shapes(graph, torch.zeros(ANY_BATCH, *shape))
    return free


def _array(tensor: onnx.TensorProto, name: str) -> Array:
    with blamed(ModelError, f"{name}: tensor {tensor.name!r} cannot be read"):
        return numpy_helper.to_array(tensor)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def refuse_unsupported(proto: onnx.ModelProto, name: str) -> None:
    """Raise UnsupportedOperator, or ModelError for a network that is quantized already, before anything is built."""
    missing: dict[str, list[str]] = {}
    _collect_unsupported(proto.graph, name, {""}, missing, opset_of(proto))
    if missing:
        raise UnsupportedOperator(f"{name}: operator {'; also '.join(_missing(missing))}")


def _collect_unsupported(graph: onnx.GraphProto, name: str, known: set[str], missing: dict[str, list[str]], opset: int) -> None:
    known.update(tensor.name for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type in QUANTIZED or node.op_type.startswith("QLinear"):
            raise ModelError(f"{name}: is already quantized (node {label(node)!r} is a {node.op_type})")
        if node.op_type == "If" and _is_standard(node):
            for attribute in node.attribute:
                _collect_unsupported(attribute.g, name, set(known), missing, opset)
            continue
        foldable = _is_standard(node) and node.op_type not in NEVER_FOLDED and known.issuperset(node.input)
        if foldable or (_is_standard(node) and node.op_type in ("Shape", "Size")):
            known.update(node.output)
        elif not (_is_standard(node) and node.op_type in OPERATORS) and not can_stay(node, opset):
            missing.setdefault(_title(node), []).append(label(node))


def _title(node: onnx.NodeProto) -> str:
    return node.op_type if _is_standard(node) else f"{node.op_type} (domain {node.domain})"


def _missing(missing: dict[str, list[str]]) -> Iterator[str]:
    verb = " is not supported"
    for title, labels in missing.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        yield f"{title}{verb}: node {labels[0]!r}{more}"
        verb = ""


def can_stay(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a node may be left to ONNX Runtime: of a known operator that draws nothing and runs no graph of its own."""
    if node.op_type in NEVER_FOLDED or any(attribute.type in SUBGRAPHS for attribute in node.attribute):
        return False
    if node.domain == MICROSOFT:
        return node.op_type in contributed()
    return _is_standard(node) and bool(onnx.defs.has(node.op_type, opset, ""))


def _add(builder: Builder, node: onnx.NodeProto) -> None:
    """Import one node: run it where all its inputs are known, else add its counterpart to the graph, or what runs it as it is.

    Where that cannot be, as its sizes depend on values, it is left behind, and so is what reads it.
    """
    inputs = [builder.values.get(name) for name in node.input if name]
    if builder.behind.intersection((*node.input, *node.output)):
        return builder.leave(node)
    if None in inputs:
        lost = next(name for name in node.input if name and name not in builder.values)
        raise ModelError(f"{builder.model}: node {label(node)!r} ({node.op_type}) reads {lost!r}, which nothing computes")
    if node.op_type == "If" and _is_standard(node):
        condition = Op(builder, node).known(0)
        builder.branches[node.output[0]] = "then_branch" if bool(condition) else "else_branch"
        return builder.leave(node)  # its branch takes its place
    if _is_standard(node) and node.op_type not in KEPT_WHEN_KNOWN and all(isinstance(value, Known) for value in inputs):
        results = _fold(builder, node)
    else:
        try:
            results = _converted(builder, node)
        except UnsupportedOperator as reason:
            if not can_stay(node, builder.opset):
                raise
            staying = None if isinstance(reason, Computed) else stays(builder, node)
            if staying is None:
                builder.reasons[node.output[0]] = str(reason)
                return builder.leave(node)
            builder.staying.update(filter(None, node.output))
            results = staying
    for name, value in zip(node.output, results, strict=False):
        if name:
            builder.keep(name, value)
        if isinstance(value, fx.Node) and value.op == "call_function" and notes(value).origin is None:
            set_notes(value, replace(notes(value), origin=name))
    return None


def _converted(builder: Builder, node: onnx.NodeProto) -> list[fx.Node | Known]:
    if not _is_standard(node) or node.op_type not in OPERATORS:
        raise UnsupportedOperator(f"{builder.model}: node {label(node)!r} ({_title(node)}) has no counterpart")
    with blamed(ModelError, f"{builder.model}: node {label(node)!r} ({node.op_type}) cannot be imported"):
        result = OPERATORS[node.op_type](Op(builder, node))
    return result if isinstance(result, list) else [result]


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
