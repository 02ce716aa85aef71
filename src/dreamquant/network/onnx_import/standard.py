"""ONNX models in other words -> the same in those that runtimes quantize: a newer opset, standard operators, no branches.

What is taken apart here goes out so too: an operator that ONNX Runtime has merged (com.microsoft) has no integer form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, version_converter

from dreamquant.errors import ModelError, UnsupportedOperator, reason
from dreamquant.runtime import MICROSOFT

OLDEST, LIFTED, WITH_LAYERNORM = 7, 13, 17
NEWEST_OLD = 10  # opsets up to this one are lifted
EACH_CHANNEL = 21  # from this opset on GroupNormalization scales each channel, before it each group
SKIPS = "SkipLayerNormalization"


class Pieces:
    """Standard nodes that stand for one node, its attributes, and names that nothing has."""

    def __init__(self, node: onnx.NodeProto, taken: set[str]) -> None:
        self.node, self.taken = node, taken
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def input(self, index: int) -> str:
        """The name of an input, empty where it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def fresh(self, kind: str) -> str:
        """A name for a helper value."""
        return fresh(f"{self.node.output[0]}_{kind.lower()}", self.taken)

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """Add a node; returns its output's name, `to` where that is given."""
        name = to or self.fresh(kind)
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def number(self, value: float) -> str:
        """Store a number."""
        return self._store(np.asarray(value, np.float32))

    def vector(self, *values: int) -> str:
        """Store whole numbers."""
        return self._store(np.array(values, np.int64))

    def _store(self, array: NDArray[Any]) -> str:
        name = self.fresh("number")
        self.stored.append(numpy_helper.from_array(array, name))
        return name


def standard(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model in opset 11 or newer, with merged operators of ONNX Runtime taken apart; itself where nothing is to be done.

    Raises `ModelError` where an old opset cannot be lifted.
    """
    opset = opset_of(proto)
    if opset < OLDEST:
        raise ModelError(f"{name}: written in opset {opset}; opset {OLDEST} and newer are read")
    merged = [node for node in proto.graph.node if (node.domain, node.op_type) in TAKEN_APART]
    needed = LIFTED if opset <= NEWEST_OLD else opset
    if any(node.op_type == SKIPS for node in merged):
        needed = max(needed, WITH_LAYERNORM)
    if needed > opset:
        proto = lifted(proto, needed, name)
    return _rewritten(proto, TAKEN_APART) if merged else proto


def opset_of(proto: onnx.ModelProto) -> int:
    """The opset of a model's standard operators."""
    return max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def lifted(proto: onnx.ModelProto, opset: int, name: str) -> onnx.ModelProto:
    """The model in a newer opset, with its properties; raises `UnsupportedOperator` where ONNX cannot convert it."""
    try:
        converted: onnx.ModelProto = version_converter.convert_version(proto, opset)
    except Exception as error:  # of the converter, which has no error of its own
        raise UnsupportedOperator(
            f"{name}: has opset {opset_of(proto)}, {opset} is needed, and it cannot be raised: {' '.join(reason(error).split())}"
        ) from error
    helper.set_model_props(converted, {entry.key: entry.value for entry in proto.metadata_props})
    return _rewritten(converted, PER_CHANNEL) if opset_of(proto) < EACH_CHANNEL <= opset else converted


def fresh(base: str, taken: set[str]) -> str:
    """`base`, or `base_1`, ... where it is taken; from then on it is."""
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _names(graph: onnx.GraphProto) -> set[str]:
    """All names of values in a graph and in its branches."""
    found = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    for node in graph.node:
        found.update((*node.input, *node.output))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _names(attribute.g)
    return found


def _rewritten(proto: onnx.ModelProto, table: Mapping[tuple[str, str], Rewrite]) -> onnx.ModelProto:
    """The model with other nodes in place of those that the table, by domain and operator, can write otherwise."""
    opset, taken = opset_of(proto), _names(proto.graph)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    for node in proto.graph.node:
        pieces, rewrite = Pieces(node, taken), table.get((node.domain, node.op_type))
        if rewrite is not None and rewrite(pieces, opset):
            nodes += pieces.nodes
            stored += pieces.stored
        else:
            nodes.append(node)
    return _with_nodes(proto, nodes, stored)


def _with_nodes(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], stored: list[onnx.TensorProto]) -> onnx.ModelProto:
    """The model with other nodes, and more stored tensors."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(stored)
    return changed


def _activation(pieces: Pieces, value: str, kind: str, numbers: list[float], to: str) -> bool:
    names = {"LeakyRelu": ["alpha"], "HardSigmoid": ["alpha", "beta"], "Relu": [], "Tanh": [], "Sigmoid": []}
    if kind == "Clip" and len(numbers) == 2:
        pieces.op("Clip", value, *map(pieces.number, numbers), to=to)
    elif kind in names:
        pieces.op(kind, value, to=to, **dict(zip(names[kind], numbers, strict=False)))
    return kind in names or kind == "Clip"


def _fused_conv(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    given = dict(pieces.attributes)
    kind, numbers = given.pop("activation", b"").decode(), list(given.pop("activation_params", []))
    output, added = pieces.node.output[0], pieces.input(3)
    inputs = [name for name in map(pieces.input, range(3)) if name]
    value = pieces.op("Conv", *inputs, to="" if kind or added else output, **given)
    if added:
        value = pieces.op("Add", value, added, to="" if kind else output)
    return not kind or _activation(pieces, value, kind, numbers, output)


def _fused_gemm(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    given = dict(pieces.attributes)
    kind = given.pop("activation", b"").decode()
    numbers = [given.pop(name) for name in ("activation_alpha", "activation_beta", "activation_gamma") if name in given]
    value = pieces.op("Gemm", *[name for name in pieces.node.input if name], to="" if kind else pieces.node.output[0], **given)
    return not kind or _activation(pieces, value, kind, numbers, pieces.node.output[0])


def _fused_matmul(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    given = pieces.attributes
    if any(given.get(name) for name in ("transA", "transB", "transBatchA", "transBatchB")):
        return False
    alpha = given.get("alpha", 1.0)
    product = pieces.op("MatMul", *pieces.node.input, to=pieces.node.output[0] if alpha == 1 else "")
    if alpha != 1:
        pieces.op("Mul", product, pieces.number(alpha), to=pieces.node.output[0])
    return True


def _gelu(pieces: Pieces, value: str, opset: int) -> None:
    """x (1 + erf(x / sqrt(2))) / 2, in the steps that runtimes know it by."""
    output = pieces.node.output[0]
    if opset >= 20:
        pieces.op("Gelu", value, to=output)
        return
    error = pieces.op("Erf", pieces.op("Div", value, pieces.number(math.sqrt(2))))
    gated = pieces.op("Mul", value, pieces.op("Add", error, pieces.number(1.0)))
    pieces.op("Mul", gated, pieces.number(0.5), to=output)


def _plain_gelu(pieces: Pieces, opset: int) -> bool:
    _gelu(pieces, pieces.input(0), opset)
    return True


def _bias_gelu(pieces: Pieces, opset: int) -> bool:
    _gelu(pieces, pieces.op("Add", pieces.input(0), pieces.input(1)), opset)
    return True


def _fast_gelu(pieces: Pieces, opset: int) -> bool:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    value = pieces.op("Add", pieces.input(0), pieces.input(1)) if pieces.input(1) else pieces.input(0)
    if opset >= 20:
        pieces.op("Gelu", value, to=pieces.node.output[0], approximate="tanh")
        return True
    cube = pieces.op("Mul", pieces.op("Pow", value, pieces.number(3.0)), pieces.number(0.044715))
    inner = pieces.op("Mul", pieces.op("Add", value, cube), pieces.number(math.sqrt(2 / math.pi)))
    gate = pieces.op("Add", pieces.op("Tanh", inner), pieces.number(1.0))
    pieces.op("Mul", pieces.op("Mul", value, gate), pieces.number(0.5), to=pieces.node.output[0])
    return True


def _quick_gelu(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    value = pieces.input(0)
    scaled = pieces.op("Mul", value, pieces.number(pieces.attributes.get("alpha", 1.702)))
    pieces.op("Mul", value, pieces.op("Sigmoid", scaled), to=pieces.node.output[0])
    return True


def _skip_layer_norm(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    outputs = list(pieces.node.output) + [""] * 4
    if outputs[1] or outputs[2]:
        return False  # mean and deviation, for training
    parts = [pieces.input(1), *([pieces.input(4)] if pieces.input(4) else [])]
    total = pieces.input(0)
    for place, part in enumerate(parts, start=1):
        total = pieces.op("Add", total, part, to=outputs[3] if place == len(parts) else "")
    norms = [name for name in (pieces.input(2), pieces.input(3)) if name]
    pieces.op("LayerNormalization", total, *norms, to=outputs[0], axis=-1, epsilon=pieces.attributes.get("epsilon", 1e-5))
    return True


def _per_channel(pieces: Pieces, opset: int) -> bool:  # noqa: ARG001
    """A GroupNormalization whose scale and bias are those of groups becomes one of channels, which ONNX's converter forgets."""
    groups = pieces.vector(int(pieces.attributes["num_groups"]))
    channels = pieces.op("Shape", pieces.input(0), start=1, end=2)
    sizes = pieces.op("Concat", groups, pieces.op("Div", channels, groups), axis=0)
    wide = [pieces.op("Expand", pieces.op("Unsqueeze", pieces.input(place), pieces.vector(1)), sizes) for place in (1, 2)]
    flat = [pieces.op("Reshape", value, pieces.vector(-1)) for value in wide]
    pieces.op("GroupNormalization", pieces.input(0), *flat, to=pieces.node.output[0], **pieces.attributes)
    return True


Rewrite = Callable[[Pieces, int], bool]  # says whether it could

TAKEN_APART: dict[tuple[str, str], Rewrite] = {
    (MICROSOFT, "FusedConv"): _fused_conv,
    (MICROSOFT, "FusedGemm"): _fused_gemm,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "Gelu"): _plain_gelu,
    (MICROSOFT, "BiasGelu"): _bias_gelu,
    (MICROSOFT, "FastGelu"): _fast_gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
    (MICROSOFT, SKIPS): _skip_layer_norm,
}
PER_CHANNEL: dict[tuple[str, str], Rewrite] = {("", "GroupNormalization"): _per_channel}


# ---- branches whose condition is known


def without_branches(proto: onnx.ModelProto, taken: Mapping[str, str]) -> onnx.ModelProto:
    """The model with the nodes of a branch in place of each If of which `taken` has the attribute, by its first output."""
    names = _names(proto.graph)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    for node in proto.graph.node:
        if node.op_type != "If" or node.output[0] not in taken:
            nodes.append(node)
            continue
        branch = onnx.GraphProto()
        branch.CopyFrom(next(a.g for a in node.attribute if a.name == taken[node.output[0]]))
        made = {tensor.name for tensor in branch.initializer} | {name for one in branch.node for name in one.output if name}
        renamed = {name: fresh(f"{node.output[0]}_{name}", names) for name in sorted(made)}
        _rename(branch, renamed)
        for tensor in branch.initializer:
            tensor.name = renamed[tensor.name]
        stored += branch.initializer
        nodes += branch.node
        for inner, outer in zip(branch.output, node.output, strict=True):
            if outer:
                nodes.append(helper.make_node("Identity", [renamed.get(inner.name, inner.name)], [outer], name=outer))
    return _with_nodes(proto, nodes, stored)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call values by other names, in a graph and in the branches inside it."""
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
                for value in attribute.g.output:
                    value.name = names.get(value.name, value.name)


# ---- axes that runtimes mistake


def without_axes(
    proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, NDArray[Any]]
) -> onnx.ModelProto:
    """The model whose Pads and Resizes of some axes name all of them, itself where none does; by the values' names `shapes` has
    their sizes and `known` those that are constants.

    ONNX Runtime, which computes layers in integers with their channels last, takes such axes for those of another order.
    """
    names = _names(proto.graph)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    for node in proto.graph.node:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        values = _all_axes(node, shapes, known)
        if values is not None:
            place = 1 if node.op_type == "Pad" else 2
            plain.input[place] = fresh(f"{node.output[0]}_axes", names)
            stored.append(numpy_helper.from_array(values, plain.input[place]))
            del plain.input[3:], plain.attribute[:]
            plain.attribute.extend(one for one in node.attribute if one.name != "axes")
        nodes.append(plain)
    return _with_nodes(proto, nodes, stored) if stored else proto


def _all_axes(
    node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, NDArray[Any]]
) -> NDArray[Any] | None:
    """The pads, or scales, of all axes of a node that has them for some; None for any other node."""
    inputs = [*node.input, "", "", ""]
    if node.op_type not in ("Pad", "Resize") or inputs[0] not in shapes:
        return None
    rank = len(shapes[inputs[0]])
    if node.op_type == "Pad":
        if inputs[3] not in known or inputs[1] not in known:
            return None
        axes = known[inputs[3]].ravel() % rank
        pads = np.zeros((2, rank), np.int64)
        pads[:, axes] = known[inputs[1]].reshape(2, -1)
        return pads.ravel()
    given = [list(one.ints) for one in node.attribute if one.name == "axes"]
    if not given or inputs[2] not in known or not known[inputs[2]].size:
        return None
    scales = np.ones(rank, np.float32)
    scales[[axis % rank for axis in given[0]]] = known[inputs[2]]
    return scales
