"""Files as exporters write them, each of a kind: loaded, quantized, written and proven in ONNX Runtime; or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dreamquant.assess.compare import compare
from dreamquant.errors import DreamQuantError, ModelError, UnsupportedOperator
from dreamquant.exporters.export import Artifact, export
from dreamquant.exporters.qdq import check_writable
from dreamquant.flow import run
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.opaque import float_operators
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

Array = np.ndarray[Any, Any]
Tensors = dict[str, Any]
FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
MICROSOFT = "com.microsoft"


def floats(*shape: int, size: float = 0.3) -> Array:
    return size * np.random.default_rng(list(shape)).standard_normal(shape, dtype=np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node whose names are split at blanks; `-` is an input left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def merged(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return node(op, inputs, outputs, domain=MICROSOFT, **attributes)


WEIGHTS: Tensors = {"w1": floats(6, 3, 3, 3), "w2": floats(6, 6, 3, 3), "w3": floats(6, 10)}
FIRST = [node("Conv", "x w1", "c1", pads=[1] * 4), node("Relu", "c1", "r1")]
SECOND = [node("Conv", "r1 w2", "c2", pads=[1] * 4), node("Relu", "c2", "r2")]
POOL = [node("GlobalAveragePool", "r2", "g"), node("Flatten", "g", "f")]
HEAD = [*POOL, node("MatMul", "f w3")]
BODY = [*FIRST, *SECOND]
SCORES = [*BODY, *POOL, node("MatMul", "f w3", "z")]
ROWS = node("Reshape", "r2 rows", "q")  # (N, 6, 64)


def model(
    nodes: Sequence[onnx.NodeProto],
    tensors: Tensors | None = None,
    *,
    opset: int = 17,
    shape: tuple[int | str, ...] = ("N", 3, 8, 8),
    dtype: int = FLOAT,
    outputs: str = "y",
    kind: int = FLOAT,
) -> onnx.ModelProto:
    """A model of nodes on `WEIGHTS` and more `tensors`; in half precision these are, too."""
    stored = WEIGHTS | {"rows": ints(0, 6, -1)} | (tensors or {})
    if dtype == HALF:
        stored = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in stored.items()}
    read = {name for one in nodes for name in one.input}
    read |= {name for one in nodes for a in one.attribute if a.HasField("g") for inner in a.g.node for name in inner.input}
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items() if name in read],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10 if opset >= 21 else 8)


def old(opset: int) -> onnx.ModelProto:
    """What changed since: Clip, Dropout, Upsample, Slice and Pad had attributes."""
    nodes = [
        FIRST[0],
        node("BatchNormalization", "c1 s m m s", "n"),
        node("Clip", "n", "k", min=0.0, max=6.0),
        node("Dropout", "k", "d"),
        node("Upsample", "d", "u", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
        if opset < 9
        else node("Upsample" if opset == 9 else "Resize", "d up", "u", mode="nearest"),
        node("Slice", "u", "r1", axes=[2], starts=[1], ends=[9]) if opset < 10 else node("Slice", "u one nine two", "r1"),
        SECOND[0],
        node("Pad", "c2", "p", pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        node("Relu", "p", "r2"),
        *HEAD,
    ]
    tensors = {"s": np.abs(floats(6)) + 0.5, "m": floats(6), "up": np.array([1, 1, 2, 2], np.float32)}
    return model(nodes, tensors | {"one": ints(1), "nine": ints(9), "two": ints(2)}, opset=opset)


def branch(name: str, nodes: list[onnx.NodeProto], output: str, tensors: Tensors | None = None) -> onnx.GraphProto:
    stored = [numpy_helper.from_array(array, key) for key, array in (tensors or {}).items()]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, FLOAT, None)], stored)


def choice(condition: str, output: str, yes: onnx.GraphProto, no: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", [condition], [output], "if", then_branch=yes, else_branch=no)


def layer_in_a_branch() -> onnx.ModelProto:
    """A choice in a choice; the branches of each call their values alike."""
    left, right = branch("a", [node("Conv", "r1 w", "p", pads=[1] * 4)], "p"), branch("b", [node("Neg", "r1", "p")], "p")
    yes = branch("yes", [choice("cond", "i", left, right), node("Relu", "i", "o")], "o", {"w": WEIGHTS["w2"]})
    no = branch("no", [node("Neg", "r1", "o")], "o")
    return model([*FIRST, choice("cond", "c2", yes, no), SECOND[1], *HEAD], {"cond": np.array(True)})


def squeezed() -> onnx.ModelProto:
    """What torch makes of `squeeze`: a choice by the size."""
    yes, no = branch("yes", [node("Squeeze", "g axes", "o")], "o"), branch("no", [node("Identity", "g", "o")], "o")
    size = [node("Shape", "g", "size", start=2, end=3), node("Equal", "size one", "is")]
    return model([*BODY, POOL[0], *size, choice("is", "f", yes, no), HEAD[2]], {"one": ints(1), "axes": ints(2, 3)})


def recurrent(op: str, gates: int, dtype: int = FLOAT) -> onnx.ModelProto:
    """Columns of the map as steps (T, N, C), a recurrent layer, scores of each step."""
    nodes = [*BODY, ROWS, node("Transpose", "q", "t", perm=[2, 0, 1]), node(op, "t wi wr", "h", hidden_size=4)]
    nodes += [node("Squeeze", "h axis", "s"), node("MatMul", "s wo")]
    tensors = {"wi": floats(1, gates * 4, 6), "wr": floats(1, gates * 4, 4), "axis": ints(1), "wo": floats(4, 10)}
    return model(nodes, tensors, dtype=dtype, kind=dtype)


GRID = np.stack(np.meshgrid(np.linspace(-0.9, 0.9, 8), np.linspace(-0.9, 0.9, 8)), -1)[None].astype(np.float32)
DETECTED = [
    *BODY,
    node("Conv", "r2 wb", "b0"),
    node("Reshape", "b0 four", "b1"),
    node("Transpose", "b1", "boxes", perm=[0, 2, 1]),
    node("Conv", "r2 ws", "s0"),
    node("Sigmoid", "s0", "s1"),
    node("Reshape", "s1 three", "scores"),
]
DETECTOR: Tensors = {
    "wb": np.abs(floats(4, 6, 1, 1)),
    "ws": floats(3, 6, 1, 1),
    "four": ints(0, 4, -1),
    "three": ints(0, 3, -1),
    "most": ints(5),
    "overlap": np.array([0.5], np.float32),
    "least": np.array([0.2], np.float32),
}
NMS = node("NonMaxSuppression", "boxes scores most overlap least", "chosen")
PICKED = [
    node("Gather", "chosen zero", "image", axis=1),
    node("Gather", "chosen two", "box", axis=1),
    node("Unsqueeze", "image last", "i"),
    node("Unsqueeze", "box last", "b"),
    node("Concat", "i b", "both", axis=1),
    node("GatherND", "boxes both"),
]
TURNED = [*SCORES, node("Transpose", "z", "zt")]
NORMS = {"s": np.abs(floats(6)) + 0.5, "b": floats(6), "m": floats(6)}


def batchnorm(source: str, result: str) -> onnx.NodeProto:
    return node("BatchNormalization", f"{source} s b m s", result)


READ: dict[str, Callable[[], onnx.ModelProto]] = {
    **{f"opset-{opset}": lambda opset=opset: old(opset) for opset in (7, 8, 9, 10)},
    "half": lambda: model([*BODY, *HEAD], dtype=HALF, kind=HALF),
    "half-recurrent": lambda: recurrent("LSTM", 4, HALF),
    "bytes": lambda: model(
        [node("Cast", "x", "i", to=FLOAT), node("Conv", "i w1", "c1"), *BODY[1:], *HEAD], dtype=TensorProto.UINT8
    ),
    "bytes-last": lambda: model(
        [
            node("Cast", "x", "i", to=FLOAT),
            node("Transpose", "i", "t", perm=[0, 3, 1, 2]),
            node("Conv", "t w1", "c1"),
            *BODY[1:],
            *HEAD,
        ],
        dtype=TensorProto.UINT8,
        shape=("N", 8, 9, 3),
    ),
    "batch-4": lambda: model([*BODY, *HEAD], shape=(4, 3, 8, 8)),
    "batch-4-in-a-shape": lambda: model(
        [*BODY, POOL[0], node("Reshape", "g to", "f"), HEAD[2]], {"to": ints(4, 6)}, shape=(4, 3, 8, 8)
    ),
    "batch-4-steps": lambda: model(
        [*BODY, node("Reshape", "r2 to", "q"), node("Transpose", "q", "t", perm=[2, 0, 1]), node("MatMul", "t w3")],
        {"to": ints(4, 6, 64)},
        shape=(4, 3, 8, 8),
    ),
    "branch": layer_in_a_branch,
    "branch-by-size": squeezed,
    "groups-18": lambda: model(
        [FIRST[0], node("GroupNormalization", "c1 s b", "n", num_groups=2), node("Relu", "n", "r1"), *SECOND, *HEAD],
        {"s": floats(2), "b": floats(2)},
        opset=18,
    ),
    "two-batchnorms": lambda: model(
        [FIRST[0], batchnorm("c1", "n1"), batchnorm("n1", "n2"), node("Relu", "n2", "r1"), *SECOND, *HEAD], NORMS
    ),
    "slice-backwards": lambda: model(
        [node("Slice", "x start end axis step", "v"), node("Conv", "v w1", "c1"), *BODY[1:], *HEAD],
        {"start": ints(-1), "end": ints(-(2**63)), "axis": ints(3), "step": ints(-1)},
    ),
    "slice-two-axes": lambda: model(
        [*FIRST, node("Slice", "r1 start end axis", "v"), node("Conv", "v w2", "c2"), SECOND[1], *HEAD],
        {"start": ints(1, 1), "end": ints(7, 8), "axis": ints(2, 3)},
    ),
    "conv-same": lambda: model([*FIRST, node("Conv", "r1 w2", "c2", auto_pad="SAME_UPPER", strides=[2, 2]), SECOND[1], *HEAD]),
    "deconv-uneven": lambda: model(
        [*FIRST, node("ConvTranspose", "r1 w2 b", "c2", pads=[0, 1, 1, 0]), SECOND[1], *HEAD], {"b": floats(6)}
    ),
    "pool-uneven": lambda: model([*FIRST, node("MaxPool", "r1", "p", kernel_shape=[2, 2], pads=[0, 0, 1, 1]), *SECOND, *HEAD]),
    "depth-to-space": lambda: model(
        [
            *FIRST,
            node("Conv", "r1 wd", "d"),
            node("DepthToSpace", "d", "e", blocksize=2),
            node("Conv", "e w2", "c2"),
            SECOND[1],
            *HEAD,
        ],
        {"wd": floats(24, 6, 1, 1)},
    ),
    "pad-of-axes": lambda: model(
        [*FIRST, node("Pad", "r1 by - axis", "p"), node("Conv", "p w2", "c2"), SECOND[1], *HEAD],
        {"by": ints(1, 2), "axis": ints(-1)},
        opset=18,
    ),
    "resize-of-axes": lambda: model(
        [*FIRST, node("Resize", "r1 - by", "p", axes=[2, 3], mode="linear"), node("Conv", "p w2", "c2"), SECOND[1], *HEAD],
        {"by": np.array([2, 2], np.float32)},
        opset=18,
    ),
    "steps-first": lambda: model([*BODY, ROWS, node("Transpose", "q", "t", perm=[2, 0, 1]), node("MatMul", "t w3")]),
    "one-number": lambda: model([*SCORES, node("ReduceSum", "z axis", keepdims=0)], {"axis": ints(1)}),
    "yes-and-no": lambda: model([*SCORES, node("Greater", "z zero")], {"zero": np.float32(0)}, kind=BOOL),
    "class": lambda: model([*SCORES, node("ArgMax", "z", axis=1, keepdims=0)], kind=INT64),
    "flat": lambda: model([*SCORES, node("Reshape", "z all")], {"all": ints(-1)}),
    "turned": lambda: model(TURNED, outputs="zt"),
    "fused-conv": lambda: model(
        [
            merged("FusedConv", "x w1 b", "r1", activation="Clip", activation_params=[0.0, 6.0], pads=[1] * 4),
            merged("FusedConv", "r1 w2 b r1", "r2", activation="LeakyRelu", activation_params=[0.1], pads=[1] * 4),
            *POOL,
            merged("FusedGemm", "f w3", activation="Relu"),
        ],
        {"b": floats(6)},
    ),
    "gelus": lambda: model(
        [FIRST[0], merged("Gelu", "c1", "r1"), SECOND[0], merged("FastGelu", "c2", "e"), merged("QuickGelu", "e", "r2"), *HEAD]
    ),
    "gelus-20": lambda: model([FIRST[0], merged("Gelu", "c1", "r1"), SECOND[0], merged("FastGelu", "c2", "r2"), *HEAD], opset=20),
    "skip-layer-norm": lambda: model(
        [
            *BODY,
            ROWS,
            node("Transpose", "q", "t", perm=[0, 2, 1]),
            merged("FusedMatMul", "t w", "p", alpha=0.5),
            merged("SkipLayerNormalization", "p t s b m", "n"),
            merged("BiasGelu", "n b", "e"),
            node("MatMul", "e w3"),
        ],
        NORMS | {"w": floats(6, 6)},
        opset=14,
    ),
}
STAYING: dict[str, tuple[Callable[[], onnx.ModelProto], list[str], list[str]]] = {  # the model, what stays, what is compared
    "lstm": (lambda: recurrent("LSTM", 4), ["lstm"], ["y"]),
    "gru": (lambda: recurrent("GRU", 3), ["gru"], ["y"]),
    "grid-sample": (
        lambda: model(
            [
                *FIRST,
                node("Shape", "x", "n", start=0, end=1),
                node("Concat", "n rest", "to", axis=0),
                node("Expand", "grid to", "e"),
                node("GridSample", "r1 e", "v"),
                node("Conv", "v w2", "c2"),
                SECOND[1],
                *HEAD,
            ],
            {"grid": GRID, "rest": ints(8, 8, 2)},
        ),
        ["gridsample"],
        ["y"],
    ),
    "unpool": (
        lambda: model(
            [
                *FIRST,
                node("MaxPool", "r1", "p i", kernel_shape=[2, 2], strides=[2, 2]),
                node("Conv", "p w2", "c2", pads=[1] * 4),
                node("MaxUnpool", "c2 i", "u", kernel_shape=[2, 2], strides=[2, 2]),
                node("Conv", "u w2"),
            ]
        ),
        ["maxpool", "maxunpool"],
        ["y"],
    ),
    "scatter": (
        lambda: model(
            [*TURNED, node("Gather", "zt picked", "g1", axis=0), node("ScatterND", "zt to g1", "t"), node("Transpose", "t")],
            {"picked": ints(0, 3), "to": ints(2, 5).reshape(2, 1)},
        ),
        ["scatternd"],
        ["y"],
    ),
    "one-hot": (
        lambda: model(
            [*SCORES, node("ArgMax", "z", "a", axis=1, keepdims=0), node("OneHot", "a ten ends")],
            {"ten": np.int64(10), "ends": np.array([0, 1], np.float32)},
        ),
        ["onehot"],
        ["y"],
    ),
    "double": (
        lambda: model(
            [
                *BODY,
                *POOL,
                node("Cast", "f", "d", to=11),
                node("Add", "d d", "e"),
                node("Cast", "e", "k", to=1),
                node("MatMul", "k w3"),
            ]
        ),
        ["cast"],
        ["y"],
    ),
    "merged": (
        lambda: model([*BODY, merged("GridSample", "r2 grid")], {"grid": GRID}, shape=(1, 3, 8, 8)),
        ["gridsample"],
        ["y"],
    ),
    "rois": (
        lambda: model(
            [*BODY, node("RoiAlign", "r2 rois of", "a", output_height=2, output_width=2), node("Conv", "a w")],
            {"rois": np.array([[0, 0, 4, 4], [1, 1, 6, 6]], np.float32), "of": ints(0, 0), "w": floats(6, 6, 1, 1)},
        ),
        ["RoiAlign", "Conv"],
        ["r2"],
    ),
    "boxes": (
        lambda: model([*DETECTED, NMS], DETECTOR, outputs="chosen", kind=INT64),
        ["NonMaxSuppression"],
        ["boxes", "scores"],
    ),
    "boxes-picked": (
        lambda: model([*DETECTED, NMS, *PICKED], DETECTOR | {"zero": np.int64(0), "two": np.int64(2), "last": ints(-1)}),
        ["NonMaxSuppression", "Gather (2)", "Unsqueeze (2)", "Concat", "GatherND"],
        ["boxes", "scores"],
    ),
    "where": (
        lambda: model(
            [*DETECTED, node("Greater", "scores half", "mask"), node("NonZero", "mask")],
            DETECTOR | {"half": np.float32(0.5)},
            kind=INT64,
        ),
        ["NonZero"],
        ["mask"],
    ),
}
NO = {"zero": np.float32(0), "one": ints(1), "loops": np.int64(2)}
YES_NO = branch("yes", [node("Relu", "f", "o")], "o"), branch("no", [node("Neg", "f", "o")], "o")
LOOPED = helper.make_graph(
    [node("Identity", "go", "on"), node("Relu", "in", "out")],
    "body",
    [helper.make_tensor_value_info(name, kind, None) for name, kind in (("i", INT64), ("go", BOOL), ("in", FLOAT))],
    [helper.make_tensor_value_info(name, kind, None) for name, kind in (("on", BOOL), ("out", FLOAT))],
)
REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "opset-6": (lambda: model([*BODY, *HEAD], opset=6), "opset 7 and newer are read"),
    "converter": (lambda: model([*BODY, *HEAD, node("Scan", "y", "s")], opset=8, outputs="s"), "Scan is not supported"),
    "branch-by-image": (
        lambda: model(
            [
                *SCORES[:-1],
                node("ReduceSum", "f", "s", keepdims=0),
                node("Greater", "s zero", "is"),
                choice("is", "k", *YES_NO),
                node("MatMul", "k w3"),
            ],
            NO,
        ),
        r"'if' \(If\): input 0 \('is'\) depends on the images",
    ),
    "branch-by-batch": (
        lambda: model(
            [
                *SCORES[:-1],
                node("Shape", "x", "n", end=1),
                node("Equal", "n one", "is"),
                choice("is", "k", *YES_NO),
                node("MatMul", "k w3"),
            ],
            NO,
        ),
        r"'if' \(If\): its condition depends on the number of images",
    ),
    "loop": (lambda: model([*BODY, node("Loop", "loops - r2", body=LOOPED)], NO), "operator Loop is not supported"),
    "unknown": (lambda: model([*BODY, merged("Nothing", "r2")]), r"operator Nothing \(domain com.microsoft\) is not supported"),
    "scalar": (lambda: model([*SCORES, node("ReduceSum", "z", keepdims=0)]), "has no axis of theirs"),
    "all-behind": (
        lambda: model([node("Cast", "x", "h", to=TensorProto.BFLOAT16), node("Cast", "h", "i", to=FLOAT), node("Conv", "i w1")]),
        r"node 'Cast_h' \(Cast\): attribute to=BFLOAT16.*; no layer comes before it",
    ),
}


def opened(proto: onnx.ModelProto, folder: Path) -> Network:
    path = folder / "tiny.onnx"
    onnx.save(proto, str(path))
    return load(path, pixels="0..255" if proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8 else "none")


def written(network: Network, folder: Path, bits: str = "W8A8") -> tuple[Artifact, Samples]:
    check_writable(network, load_plan("deploy"), bits)
    samples = synthesize(network, 6, method="noise")
    return export(quantize(network, samples, bits=bits), folder / "out.onnx", samples), samples


@pytest.mark.parametrize("name", READ)
def test_kinds_of_files_that_are_quantized(name: str, tmp_path: Path) -> None:
    proto = READ[name]()
    network = opened(proto, tmp_path)
    artifact, samples = written(network, tmp_path)

    assert float_operators(network) == (["lstm"] if name == "half-recurrent" else [])
    assert artifact.outputs == tuple(output.name for output in proto.graph.output)
    runner = onnx_runner(artifact.path)
    one, other = runner.all(samples.images.numpy()), onnx_runner(tmp_path / "tiny.onnx").all(samples.images.numpy())
    assert [value.shape for value in one] == [value.shape for value in other]
    ends = [value.type.tensor_type.elem_type for value in (proto.graph.input[0], proto.graph.output[0])]
    kept = onnx.load(str(artifact.path)).graph
    assert [value.type.tensor_type.elem_type for value in (kept.input[0], kept.output[0])] == ends


@pytest.mark.parametrize("name", STAYING)
@pytest.mark.parametrize("rewritten", [False, True], ids=["as-read", "rewritten"])
def test_what_has_no_counterpart_stays_in_float(name: str, rewritten: bool, tmp_path: Path) -> None:
    make, staying, compared = STAYING[name]
    proto = make()
    network = opened(proto, tmp_path)
    assert float_operators(network) == staying
    assert [output.name for output in network.outputs] == compared

    artifact, samples = written(network.rebuilt(network.graph) if rewritten else network, tmp_path)
    one, other = (onnx_runner(path).all(samples.images.numpy()) for path in (artifact.path, tmp_path / "tiny.onnx"))
    assert list(artifact.outputs) == compared
    assert [value.dtype for value in one] == [value.dtype for value in other]
    assert sum(layer.op_type == "QuantizeLinear" for layer in onnx.load(str(artifact.path)).graph.node) > 2


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_of_files_that_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(DreamQuantError, match=reason) as caught:
        opened(make(), tmp_path)
    assert "\n" not in str(caught.value)


def test_one_number_for_the_whole_batch_is_left_to_the_file(tmp_path: Path) -> None:
    proto = model([*SCORES, node("ReduceSum", "z", "s", keepdims=0)], outputs="z s")
    network = opened(proto, tmp_path)
    artifact, _ = written(network, tmp_path)

    assert network.remarks == ("stays in float: ReduceSum", "no answer to each image: s; measured is z")
    assert [output.name for output in network.outputs] == ["z"]
    assert [output.name for output in onnx.load(str(artifact.path)).graph.output] == ["z", "s"]


def test_what_is_not_as_it_was_is_said(tmp_path: Path) -> None:
    assert opened(READ["opset-9"](), tmp_path).remarks == ("opset 9 becomes 13",)
    assert opened(READ["branch"](), tmp_path).remarks == ("branches whose condition is known take the place of their If",)
    merged = ("opset 14 becomes 17", "taken apart: BiasGelu, FusedMatMul, SkipLayerNormalization")
    assert opened(READ["skip-layer-norm"](), tmp_path).remarks == merged


@pytest.mark.parametrize("name", ["groups-18", "opset-8"])
def test_four_bits_raise_the_opset_and_keep_the_function(name: str, tmp_path: Path) -> None:
    artifact, _ = written(opened(READ[name](), tmp_path), tmp_path, "W4A8")

    assert onnx.load(str(artifact.path)).opset_import[0].version == 21


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamquant.exporters import qdq

    def no(*_: object) -> None:
        raise UnsupportedOperator("cannot be raised")

    onnx.save(READ["flat"](), str(tmp_path / "tiny.onnx"))
    monkeypatch.setattr(qdq, "lifted", no)
    heard: list[str] = []
    with pytest.raises(UnsupportedOperator, match="cannot be raised"):
        run(tmp_path / "tiny.onnx", tmp_path / "out.onnx", bits="W4A8", pixels="none", progress=lambda *_: heard.append("work"))
    assert not heard


SETTINGS = ["synthesis.method=noise", "synthesis.count=6", "synthesis.held_out=4", "reconstruction.steps=5"]


@pytest.mark.parametrize("name", ["lstm", "scatter", "boxes"])
def test_layers_around_what_stays_learn_their_roundings(name: str, tmp_path: Path) -> None:
    onnx.save(STAYING[name][0](), str(tmp_path / "tiny.onnx"))
    said: list[str] = []
    result = run(
        tmp_path / "tiny.onnx",
        tmp_path / "out.onnx",
        bits="W4A4",
        pixels="none",
        settings=SETTINGS,
        estimate=False,
        announce=said.append,
    )

    assert f"stays in float: {', '.join(STAYING[name][1])}" in said
    assert result.summary()["float_layers"] == STAYING[name][1]


def test_outputs_that_are_turned_are_learnt_layer_by_layer(tmp_path: Path) -> None:
    onnx.save(READ["turned"](), str(tmp_path / "tiny.onnx"))
    run(tmp_path / "tiny.onnx", tmp_path / "out.onnx", bits="W4A4", pixels="none", settings=SETTINGS, estimate=False)

    assert (tmp_path / "out.onnx").exists()


def test_outputs_whose_sizes_depend_on_values_are_compared_by_what_they_are_made_of(tmp_path: Path) -> None:
    network = opened(STAYING["boxes-picked"][0](), tmp_path)
    artifact, samples = written(network, tmp_path)
    found = compare(tmp_path / "tiny.onnx", artifact.path, samples=samples, rounds=1)
    assert [output.name for output in found.outputs] == ["boxes", "scores"]
    assert "compared is what is read for them, boxes, scores" in found.notes[0]

    other = onnx.load(str(artifact.path))
    for one in other.graph.node:
        one.input[:] = ["x_scores" if name == "scores" else name for name in one.input]
        one.output[:] = ["x_scores" if name == "scores" else name for name in one.output]
    onnx.save(other, str(tmp_path / "other.onnx"))
    with pytest.raises(ModelError, match="other.onnx has no boxes, scores for them"):
        compare(tmp_path / "tiny.onnx", tmp_path / "other.onnx", samples=samples, rounds=1)


def test_dreamers_say_that_no_gradient_passes(tmp_path: Path) -> None:
    network = opened(STAYING["one-hot"][0](), tmp_path)
    with pytest.raises(DreamQuantError, match="no gradient leads from y to the images, through onehot"):
        synthesize(network, 2, method="anchored", steps=2)
