"""Every operator of the importer on a tiny model: `load_onnx` itself compares each with ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dreamquant.network.graph import Network
from dreamquant.network.onnx_import import load_onnx

aten = torch.ops.aten
Array = np.ndarray[Any, Any]
IMAGES = ("N", 4, 8, 6)


def floats(*shape: int) -> Array:
    """Well-behaved weights, the same at every call of one shape."""
    rng = np.random.default_rng(list(shape))
    return rng.uniform(0.5, 1.5, shape).astype(np.float32) * rng.choice([-1, 1], shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node whose names are split at blanks; `-` is an input left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Array] | None = None,
    *,
    opset: int = 17,
    shape: tuple[int | str | None, ...] | None = IMAGES,
    dtype: int = TensorProto.FLOAT,
    outputs: str = "y",
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in (tensors or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10)


def load(folder: Path, proto: onnx.ModelProto, **options: Any) -> Network:
    path = folder / "tiny.onnx"
    onnx.save(proto, str(path))
    return load_onnx(path, **options)


def targets(network: Network) -> list[Any]:
    return [node.target for node in network.graph.graph.nodes if node.op == "call_function"]


@dataclass
class Case:
    name: str
    nodes: list[onnx.NodeProto]
    target: Any
    tensors: dict[str, Array] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def case(name: str, nodes: list[onnx.NodeProto], target: Any, tensors: Any = None, **options: Any) -> Any:
    return pytest.param(Case(name, nodes, target, tensors or {}, options), id=name)


def unary(op: str, target: Any, name: str = "", opset: int = 17, **attributes: Any) -> Any:
    return case(name or op, [node(op, "x", **attributes)], target, opset=opset)


def on_weights(op: str, target: Any, name: str, weights: dict[str, Array], opset: int = 17, **attributes: Any) -> Any:
    return case(name, [node(op, " ".join(["x", *weights]), **attributes)], target, weights, opset=opset)


KERNEL = {"w": floats(6, 4, 3, 3)}
BIASED = KERNEL | {"b": floats(6)}

CONVOLUTIONS = [
    on_weights("Conv", aten.conv2d.default, "conv", KERNEL),
    on_weights("Conv", aten.conv2d.default, "conv-bias-pads", BIASED, pads=[1, 1, 1, 1], strides=[2, 1]),
    on_weights("Conv", aten.conv2d.default, "conv-opset-11", BIASED, 11, pads=[1, 0, 1, 0], kernel_shape=[3, 3]),
    on_weights("Conv", aten.conv2d.default, "conv-opset-22", BIASED, 22, dilations=[2, 1]),
    on_weights("Conv", aten.pad.default, "conv-unequal-pads", BIASED, pads=[0, 1, 2, 1]),
    on_weights("Conv", aten.pad.default, "conv-same-upper", KERNEL, auto_pad="SAME_UPPER", strides=[2, 2]),
    on_weights("Conv", aten.pad.default, "conv-same-lower", KERNEL, auto_pad="SAME_LOWER", strides=[2, 2]),
    on_weights("Conv", aten.conv2d.default, "conv-valid", KERNEL, auto_pad="VALID"),
    on_weights("Conv", aten.conv2d.default, "conv-groups", {"w": floats(4, 2, 3, 3)}, group=2),
    on_weights("Conv", aten.conv2d.default, "conv-depthwise", {"w": floats(8, 1, 3, 3)}, group=4),
    case(
        "conv-1d",
        [node("Flatten", "x", "f", axis=2), node("Reshape", "x shape", "r"), node("Conv", "r w", pads=[2, 2])],
        aten.conv1d.default,
        {"w": floats(6, 4, 5), "shape": ints(0, 0, -1)},
    ),
    on_weights("ConvTranspose", aten.conv_transpose2d.input, "deconv", {"w": floats(4, 6, 3, 3)}),
    on_weights(
        "ConvTranspose",
        aten.conv_transpose2d.input,
        "deconv-all",
        {"w": floats(4, 3, 3, 3), "b": floats(6)},
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        output_padding=[1, 1],
        group=2,
    ),
    on_weights("ConvTranspose", aten.pad.default, "deconv-unequal", {"w": floats(4, 6, 3, 3)}, pads=[0, 1, 1, 0]),
    on_weights(
        "ConvTranspose",
        aten.pad.default,
        "deconv-same",
        {"w": floats(4, 6, 3, 3)},
        auto_pad="SAME_UPPER",
        strides=[2, 2],
    ),
    on_weights(
        "ConvTranspose",
        aten.pad.default,
        "deconv-lower",
        {"w": floats(4, 6, 3, 3)},
        auto_pad="SAME_LOWER",
        strides=[2, 2],
    ),
    on_weights(
        "ConvTranspose",
        aten.conv_transpose2d.input,
        "deconv-output-shape",
        {"w": floats(4, 6, 3, 3)},
        output_shape=[16, 12],
        strides=[2, 2],
    ),
]

CHANNELS = {"s": floats(4), "b": floats(4)}
STATISTICS = CHANNELS | {"m": floats(4), "v": np.abs(floats(4))}

NORMALIZATIONS = [
    on_weights("BatchNormalization", aten.batch_norm.default, "batch-norm", STATISTICS, epsilon=1e-3),
    on_weights("BatchNormalization", aten.batch_norm.default, "batch-norm-opset-11", STATISTICS, 11),
    on_weights("InstanceNormalization", aten.instance_norm.default, "instance-norm", CHANNELS),
    on_weights("GroupNormalization", aten.group_norm.default, "group-norm-21", CHANNELS, 21, num_groups=2),
    on_weights(
        "GroupNormalization",
        aten.repeat_interleave.self_int,
        "group-norm-18",
        {"s": floats(2), "b": floats(2)},
        18,
        num_groups=2,
    ),
    on_weights("LayerNormalization", aten.layer_norm.default, "layer-norm", {"s": floats(6), "b": floats(6)}),
    on_weights("LayerNormalization", aten.layer_norm.default, "layer-norm-axis", {"s": floats(8, 6)}, axis=2),
    unary("LpNormalization", aten.linalg_vector_norm.default, axis=1, p=2),
    unary("LRN", aten.avg_pool3d.default, size=3, alpha=0.1, beta=0.5, bias=2.0),
]

POOLS = [
    unary("MaxPool", aten.max_pool2d.default, "max-pool", kernel_shape=[2, 2], strides=[2, 2]),
    unary("MaxPool", aten.max_pool2d.default, "max-pool-ceil", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    unary("MaxPool", aten.max_pool2d.default, "max-pool-dilated", kernel_shape=[2, 2], dilations=[2, 3]),
    unary("MaxPool", aten.pad.default, "max-pool-unequal", kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]),
    unary("MaxPool", aten.pad.default, "max-pool-same", kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    unary("MaxPool", aten.max_pool2d.default, "max-pool-opset-11", opset=11, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    unary("AveragePool", aten.avg_pool2d.default, "average-pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    unary(
        "AveragePool",
        aten.avg_pool2d.default,
        "average-pool-all",
        kernel_shape=[3, 3],
        pads=[1] * 4,
        count_include_pad=1,
    ),
    unary("AveragePool", aten.avg_pool2d.default, "average-pool-ceil", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    unary("AveragePool", aten.mul.Tensor, "average-pool-same", kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2]),
    unary(
        "AveragePool",
        aten.pad.default,
        "average-pool-unequal",
        kernel_shape=[3, 3],
        pads=[0, 1, 1, 0],
        count_include_pad=1,
    ),
    unary("GlobalAveragePool", aten.adaptive_avg_pool2d.default),
    unary("GlobalMaxPool", aten.amax.default),
    case(
        "pools-1d",
        [
            node("Reshape", "x shape", "r"),
            node("MaxPool", "r", "m", kernel_shape=[3], strides=[2]),
            node("AveragePool", "m", "a", kernel_shape=[2]),
            node("GlobalAveragePool", "a"),
        ],
        aten.max_pool1d.default,
        {"shape": ints(0, 0, -1)},
    ),
]

ACTIVATIONS = [
    unary("Relu", aten.relu.default, opset=11),
    unary("Relu", aten.relu.default, "relu-22", opset=22),
    unary("Sigmoid", aten.sigmoid.default),
    unary("Tanh", aten.tanh.default),
    unary("LeakyRelu", aten.leaky_relu.default, alpha=0.1),
    unary("Elu", aten.elu.default, alpha=0.5),
    unary("Selu", aten.elu.default),
    unary("Celu", aten.celu.default, alpha=2.0),
    unary("ThresholdedRelu", aten.threshold.default, alpha=0.3),
    unary("HardSigmoid", aten.hardtanh.default),
    unary("HardSigmoid", aten.hardsigmoid.default, "hard-sigmoid-torch", alpha=1 / 6, beta=0.5),
    unary("HardSwish", aten.hardswish.default),
    unary("Mish", aten.mish.default, opset=18),
    unary("Softplus", aten.softplus.default),
    unary("Softsign", aten.abs.default),
    unary("Gelu", aten.gelu.default, opset=20),
    unary("Gelu", aten.gelu.default, "gelu-tanh", opset=20, approximate="tanh"),
    on_weights("PRelu", aten.prelu.default, "prelu-channels", {"a": floats(4, 1, 1)}),
    on_weights("PRelu", aten.prelu.default, "prelu-one", {"a": floats(1)}),
    on_weights("PRelu", aten.where.self, "prelu-elements", {"a": floats(4, 8, 6)}),
    on_weights("Clip", aten.hardtanh.default, "relu6", {"lo": np.float32(0), "hi": np.float32(6)}),
    on_weights("Clip", aten.clamp.default, "clip", {"lo": np.float32(-0.5), "hi": np.float32(0.5)}, 11),
    case("clip-high", [node("Clip", "x - hi")], aten.clamp.default, {"hi": np.float32(0.5)}),
    case("clip-open", [node("Clip", "x", "c"), node("Relu", "c")], aten.relu.default),
    case("clip-computed", [node("ReduceMax", "x", "hi", keepdims=0), node("Clip", "x - hi")], aten.clamp.Tensor),
    unary("Softmax", aten.softmax.int, axis=1),
    unary("Softmax", aten.unflatten.int, "softmax-11", opset=11, axis=1),
    unary("Softmax", aten.softmax.int, "softmax-11-last", opset=11, axis=3),
    case("softmax-11-pooled", [node("GlobalMaxPool", "x", "g"), node("Softmax", "g")], aten.softmax.int, opset=12),
    unary("LogSoftmax", aten.log_softmax.int),
    case("dropout", [node("Dropout", "x", "d"), node("Relu", "d")], aten.relu.default),
    case("identity", [node("Identity", "x", "d"), node("Relu", "d")], aten.relu.default),
]

SAME = {"c": floats(4, 1, 1)}
POSITIVE = node("Abs", "x", "p")

ELEMENTWISE = [
    on_weights("Add", aten.add.Tensor, "add", SAME),
    on_weights("Sub", aten.sub.Tensor, "sub", SAME),
    on_weights("Mul", aten.mul.Tensor, "mul", SAME),
    on_weights("Div", aten.div.Tensor, "div", SAME),
    on_weights("Min", aten.minimum.default, "min", SAME | {"d": floats(1)}),
    on_weights("Max", aten.maximum.default, "max", SAME),
    on_weights("Sum", aten.add.Tensor, "sum", SAME | {"d": floats(6)}),
    on_weights("Mean", aten.div.Tensor, "mean", SAME | {"d": floats(6)}),
    on_weights("Mod", aten.fmod.Tensor, "fmod", SAME, fmod=1),
    on_weights("Pow", aten.pow.Tensor_Scalar, "pow", {"e": np.float32(2)}),
    on_weights("Pow", aten.pow.Tensor_Scalar, "pow-int", {"e": np.int64(3)}),
    case("pow-tensor", [POSITIVE, node("Pow", "p e")], aten.pow.Tensor_Tensor, {"e": floats(6)}),
    case("sqrt", [POSITIVE, node("Sqrt", "p")], aten.sqrt.default),
    case("log", [POSITIVE, node("Log", "p")], aten.log.default),
    case("reciprocal", [node("Exp", "x", "p"), node("Reciprocal", "p")], aten.reciprocal.default),
    unary("Exp", aten.exp.default),
    unary("Erf", aten.erf.default),
    unary("Neg", aten.neg.default),
    unary("Sign", aten.sign.default),
    unary("Floor", aten.floor.default),
    unary("Ceil", aten.ceil.default),
    unary("Round", aten.round.default),
    unary("Sin", aten.sin.default),
    unary("Cos", aten.cos.default),
    unary("Tan", aten.tan.default),
    unary("Atan", aten.atan.default),
    *[
        case(op, [node(op, "x c", "t"), node("Where", "t x c")], target, SAME)
        for op, target in [
            ("Equal", aten.eq.Tensor),
            ("Less", aten.lt.Tensor),
            ("LessOrEqual", aten.le.Tensor),
            ("Greater", aten.gt.Tensor),
            ("GreaterOrEqual", aten.ge.Tensor),
        ]
    ],
    *[
        case(
            op,
            [node("Less", "x c", "t"), node("Less", "c x", "u"), node(op, "t u", "v"), node("Where", "v x c")],
            f,
            SAME,
        )
        for op, f in [
            ("And", aten.logical_and.default),
            ("Or", aten.logical_or.default),
            ("Xor", aten.logical_xor.default),
        ]
    ],
    case("not", [node("Less", "x c", "t"), node("Not", "t", "v"), node("Where", "v x c")], aten.logical_not.default, SAME),
    case("is-nan", [node("IsNaN", "x", "t"), node("Where", "t c x")], aten.isnan.default, SAME),
    case("cast", [node("Cast", "x", to=TensorProto.INT32)], aten._to_copy.default, dtype=TensorProto.INT32),
    case(
        "whole-numbers",
        [
            node("Cast", "x", "i", to=TensorProto.INT64),
            node("Mul", "i seven", "s"),
            node("Div", "s three", "d"),
            node("Mod", "d three", "m"),
            node("Pow", "m three", "p"),
            node("CastLike", "p x"),
        ],
        aten.div.Tensor_mode,
        {"seven": ints(7), "three": ints(3)},
    ),
]

AXES = {"axes": ints(2, 3)}


def reduction(op: str, target: Any, opset: int) -> Any:
    by_input = opset >= (13 if op == "ReduceSum" else 18)
    first = [node("Abs", "x", "p")]
    if by_input:
        return case(f"{op}-{opset}", [*first, node(op, "p axes", keepdims=0)], target, AXES, opset=opset)
    return case(f"{op}-{opset}", [*first, node(op, "p", axes=[-1, 2], keepdims=0)], target, opset=opset)


REDUCTIONS = [
    *[
        reduction(op, target, opset)
        for op, target in [
            ("ReduceMean", aten.mean.dim),
            ("ReduceSum", aten.sum.dim_IntList),
            ("ReduceMax", aten.amax.default),
            ("ReduceMin", aten.amin.default),
            ("ReduceProd", aten.prod.dim_int),
            ("ReduceL1", aten.linalg_vector_norm.default),
            ("ReduceL2", aten.linalg_vector_norm.default),
            ("ReduceSumSquare", aten.sum.dim_IntList),
            ("ReduceLogSum", aten.log.default),
            ("ReduceLogSumExp", aten.logsumexp.default),
        ]
        for opset in (11, 18)
    ],
    case("reduce-noop", [node("ReduceSum", "x -", "r", noop_with_empty_axes=1), node("Relu", "r")], aten.relu.default),
    case("ArgMax", [node("ArgMax", "x", axis=1)], aten.argmax.default, dtype=TensorProto.INT64),
    case("ArgMin", [node("ArgMin", "x", axis=1, keepdims=0)], aten.argmin.default, dtype=TensorProto.INT64),
    case("CumSum", [node("CumSum", "x axis")], aten.cumsum.default, {"axis": np.int64(2)}),
]

MATRICES = [
    case("matmul-weight", [node("MatMul", "x w")], aten.linear.default, {"w": floats(6, 5)}),
    case("matmul-left", [node("MatMul", "w x")], aten.matmul.default, {"w": floats(3, 8)}),
    case("matmul-both", [node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t")], aten.matmul.default),
    case("einsum", [node("Einsum", "x w", equation="bchw, dc -> bdhw")], aten.einsum.default, {"w": floats(5, 4)}),
]
FLAT = node("GlobalAveragePool", "x", "g"), node("Flatten", "g", "f")


def gemm(name: str, target: Any, weights: dict[str, Array], **attributes: Any) -> Any:
    return case(f"gemm-{name}", [*FLAT, node("Gemm", " ".join(["f", *weights]), **attributes)], target, weights)


MATRICES += [
    gemm("plain", aten.linear.default, {"w": floats(4, 5)}),
    gemm("trans-b", aten.linear.default, {"w": floats(5, 4), "b": floats(5)}, transB=1),
    gemm("alpha-beta", aten.mul.Tensor, {"w": floats(5, 4), "b": floats(5)}, transB=1, alpha=0.5, beta=2.0),
    gemm("row-bias", aten.add.Tensor, {"w": floats(4, 5), "b": floats(1, 5)}),
    gemm("scalar-bias", aten.add.Tensor, {"w": floats(4, 5), "b": floats(1)}),
    gemm("beta-zero", aten.linear.default, {"w": floats(4, 5), "b": floats(5)}, beta=0.0),
    case(
        "gemm-trans-a",
        [*FLAT, node("Transpose", "f", "t"), node("Gemm", "t w b", transA=1)],
        aten.permute.default,
        {"w": floats(4, 5), "b": floats(5)},
    ),
    case(
        "gemm-computed",
        [*FLAT, node("Gemm", "f f", "q", transB=1), node("Relu", "q")],
        aten.matmul.default,
        shape=(2, 4, 8, 6),
    ),
]

LAYOUTS = [
    case("reshape", [node("Reshape", "x s")], aten.reshape.default, {"s": ints(0, -1)}),
    case("reshape-all-zero", [node("Reshape", "x s")], aten.reshape.default, {"s": ints(0, 2, 2, -1)}, opset=11),
    unary("Flatten", aten.flatten.using_ints),
    unary("Flatten", aten.reshape.default, "flatten-2", axis=2),
    unary("Flatten", aten.reshape.default, "flatten-last", axis=-1),
    unary("Transpose", aten.permute.default, perm=[0, 2, 3, 1]),
    case("transpose-all", [node("Transpose", "x", "t"), node("Transpose", "t")], aten.permute.default),
    case("squeeze-11", [node("GlobalMaxPool", "x", "g"), node("Squeeze", "g", axes=[-1, 2])], aten.squeeze.dims, opset=11),
    case("squeeze-13", [node("GlobalMaxPool", "x", "g"), node("Squeeze", "g a")], aten.squeeze.dims, {"a": ints(2)}),
    case("squeeze-all", [node("GlobalMaxPool", "x", "g"), node("Squeeze", "g")], aten.squeeze.dims),
    case("unsqueeze-11", [node("Unsqueeze", "x", axes=[1, -1])], aten.unsqueeze.default, opset=11),
    case("unsqueeze-13", [node("Unsqueeze", "x a")], aten.unsqueeze.default, {"a": ints(4, 0)}),
    case("expand", [node("GlobalMaxPool", "x", "g"), node("Expand", "g s")], aten.expand.default, {"s": ints(1, 4, 3, 2)}),
    case("expand-higher", [node("Expand", "x s")], aten.expand.default, {"s": ints(3, 1, 1, 1, 1)}),
    case("tile", [node("Tile", "x r")], aten.repeat.default, {"r": ints(1, 2, 1, 3)}),
    case("concat", [node("Relu", "x", "r"), node("Concat", "x r", axis=-3)], aten.cat.default),
    case(
        "split-attr",
        [node("Split", "x", "a b", axis=1, split=[1, 3]), node("Mul", "a b")],
        aten.split_with_sizes.default,
        opset=11,
    ),
    case(
        "split-input",
        [node("Split", "x s", "a b", axis=1), node("Mul", "a b")],
        aten.split_with_sizes.default,
        {"s": ints(3, 1)},
    ),
    case("split-equal", [node("Split", "x", "a b", axis=1), node("Mul", "a b")], aten.split_with_sizes.default),
    case(
        "split-count",
        [node("Split", "x", "a b c d", axis=3, num_outputs=4), node("Concat", "a c d b", axis=3)],
        aten.split_with_sizes.default,
        opset=18,
        shape=("N", 4, 8, 7),
    ),
    case("slice", [node("Slice", "x s e a")], aten.slice.Tensor, {"s": ints(1, -3), "e": ints(-1, 99), "a": ints(2, -1)}),
    case("slice-no-axes", [node("Slice", "x s e")], aten.slice.Tensor, {"s": ints(0, 1), "e": ints(2**63 - 1, 3)}),
    case(
        "slice-steps",
        [node("Slice", "x s e a t")],
        aten.flip.default,
        {"s": ints(-1, 5, 0), "e": ints(-(2**63), 1, 8), "a": ints(1, 3, 2), "t": ints(-1, -2, 3)},
    ),
    case("slice-nothing", [node("Slice", "x s s", "z"), node("Relu", "z")], aten.relu.default, {"s": ints()}),
    case("pad", [node("Pad", "x p")], aten.pad.default, {"p": ints(0, 1, 2, 0, 0, 0, 1, 3)}),
    case("pad-value", [node("Pad", "x p v")], aten.pad.default, {"p": ints(0, 1, 0, 0, 0, 0, 0, 0), "v": np.float32(-2)}),
    case("pad-crop", [node("Pad", "x p")], aten.pad.default, {"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}),
    case("pad-axes", [node("Pad", "x p - a")], aten.pad.default, {"p": ints(1, 2), "a": ints(-1)}, opset=18),
    case("pad-reflect", [node("Pad", "x p", mode="reflect")], aten.pad.default, {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
    case("pad-edge", [node("Pad", "x p", mode="edge")], aten.pad.default, {"p": ints(0, 0, 0, 2, 0, 0, 0, 1)}),
    case("pad-wrap", [node("Pad", "x p", mode="wrap")], aten.pad.default, {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}, opset=19),
    unary("DepthToSpace", aten.reshape.default, blocksize=2),
    unary("DepthToSpace", aten.pixel_shuffle.default, "depth-to-space-crd", blocksize=2, mode="CRD"),
    unary("SpaceToDepth", aten.reshape.default, blocksize=2),
    case("triu", [node("Trilu", "x")], aten.triu.default),
    case("tril", [node("Trilu", "x k", upper=0)], aten.tril.default, {"k": np.int64(1)}),
    case("gather-scalar", [node("Gather", "x i", axis=1)], aten.select.int, {"i": np.int64(-1)}),
    case("gather-vector", [node("Gather", "x i", axis=2)], aten.index_select.default, {"i": ints(3, -1, 0)}),
    case("gather-matrix", [node("Gather", "x i", axis=3)], aten.unflatten.int, {"i": ints(3, 1, 0, 2).reshape(2, 2)}),
    case(
        "gather-elements",
        [node("GatherElements", "x i", axis=3)],
        aten.gather.default,
        {"i": np.zeros((2, 4, 8, 2), np.int64)},
        shape=(2, 4, 8, 6),
    ),
    case(
        "embedding",
        [node("ArgMax", "x", "i", axis=1, keepdims=0), node("Gather", "w i")],
        aten.embedding.default,
        {"w": floats(4, 5)},
    ),
    case(
        "gather-computed",
        [node("ArgMax", "x", "i", axis=1, keepdims=0), node("Gather", "w i", axis=1)],
        aten.index_select.default,
        {"w": floats(3, 4)},
        shape=(2, 4, 8, 6),
    ),
    case("top-k", [node("TopK", "x k", "y i", axis=1)], aten.topk.default, {"k": ints(2)}),
]


def resize(name: str, target: Any, opset: int = 13, **attributes: Any) -> Any:
    sizes = {"scales": np.array([1, 1, 2, 3], np.float32)}
    if "sizes" in attributes:
        sizes = {"sizes": ints(0, *attributes.pop("sizes"))}
        return case(
            name,
            [
                node("Shape", "x", "n"),
                node("Slice", "n zero one", "b"),
                node("Slice", "sizes one five", "hw"),
                node("Concat", "b hw", "to", axis=0),
                node("Resize", "x - - to", **attributes),
            ],
            target,
            sizes | {"zero": ints(0), "one": ints(1), "five": ints(5)},
            opset=opset,
        )
    if "scales" in attributes:
        sizes = {"scales": np.array([1, 1, *attributes.pop("scales")], np.float32)}
    return case(name, [node("Resize", "x - scales", **attributes)], target, sizes, opset=opset)


NEAREST, LINEAR, CUBIC = aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec
RESIZES = [
    resize("torch-nearest", NEAREST, coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    case(
        "nearest-11",
        [node("Resize", "x roi scales", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        NEAREST,
        {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
        opset=11,
    ),
    resize("nearest-half-pixel", NEAREST),
    resize("nearest-sizes", NEAREST, sizes=[4, 5, 13], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize("nearest-shrink", NEAREST, scales=[0.5, 0.6], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resize("nearest-odd", aten.index_select.default, scales=[1.7, 0.6], nearest_mode="round_prefer_ceil"),
    resize(
        "nearest-ceil",
        aten.index_select.default,
        scales=[2.0, 2.0],
        coordinate_transformation_mode="asymmetric",
        nearest_mode="ceil",
    ),
    resize("nearest-corners", aten.index_select.default, coordinate_transformation_mode="align_corners"),
    resize("linear", LINEAR, mode="linear"),
    resize("linear-odd-scale", LINEAR, mode="linear", scales=[1.7, 0.6]),
    resize("linear-torch", LINEAR, mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    resize("linear-corners", LINEAR, mode="linear", coordinate_transformation_mode="align_corners"),
    resize("linear-sizes", LINEAR, mode="linear", sizes=[4, 5, 13]),
    resize("linear-symmetric", LINEAR, 19, mode="linear", coordinate_transformation_mode="half_pixel_symmetric"),
    resize("cubic", CUBIC, mode="cubic"),
    resize("cubic-corners", CUBIC, mode="cubic", coordinate_transformation_mode="align_corners"),
    case(
        "axes",
        [node("Resize", "x - s", axes=[2, 3], mode="linear")],
        LINEAR,
        {"s": np.array([2, 2], np.float32)},
        opset=18,
    ),
    case(
        "line",
        [node("Reshape", "x shape", "r"), node("Resize", "r - s", mode="linear")],
        aten.upsample_linear1d.vec,
        {"shape": ints(0, 0, -1), "s": np.array([1, 1, 2], np.float32)},
    ),
]

ALL = [
    *CONVOLUTIONS,
    *NORMALIZATIONS,
    *POOLS,
    *ACTIVATIONS,
    *ELEMENTWISE,
    *REDUCTIONS,
    *MATRICES,
    *LAYOUTS,
    *RESIZES,
]


@pytest.mark.parametrize("case", ALL)
def test_operator_agrees_with_onnx_runtime(case: Case, tmp_path: Path) -> None:
    network = load(tmp_path, model(case.nodes, case.tensors, **case.options))

    assert case.target in targets(network)
