"""What is counted in an ONNX file: files of this package, of ONNX Runtime's quantizer, and graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_static

import dreamquant
from dreamquant.assess.contents import Contents, contents
from dreamquant.calibration import CalibrationReader
from dreamquant.errors import ModelError
from dreamquant.samples import Samples

FOLDED = "digits_bnfolded.onnx"
KERNEL = np.ones((4, 3, 1, 1), np.float32)
Stored = dict[str, Any]
node = helper.make_node
ON_GRID = [
    node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
    node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
]
DEQUANTIZED = node("DequantizeLinear", ["w8", "scale", "zero"], ["wd"])
EIGHT: Stored = {"w8": KERNEL.astype(np.int8), "scale": np.float32(0.1), "zero": np.int8(0)}


def surveyed(path: Path, nodes: list[onnx.NodeProto], stored: Stored, **options: Any) -> Contents:
    """The contents of a file of these nodes, from `x` (n, 3, 8, 8) to `y`, and stored tensors."""
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, **options)
    onnx.save(model, path)
    return contents(path)


@pytest.mark.parametrize(
    ("nodes", "stored", "group"),
    [
        pytest.param([node("Conv", ["x", "w"], ["y"])], {"w": KERNEL}, "floats", id="float"),
        pytest.param([*ON_GRID, DEQUANTIZED, node("Conv", ["xd", "wd"], ["y"])], EIGHT, "quantized", id="Q/DQ"),
        pytest.param([DEQUANTIZED, node("Conv", ["x", "wd"], ["y"])], EIGHT, "weights_only", id="weights"),
        pytest.param([*ON_GRID, node("Conv", ["xd", "w"], ["y"])], {**EIGHT, "w": KERNEL}, "floats", id="input"),
        pytest.param(
            [*ON_GRID, DEQUANTIZED, node("MaxPool", ["xd"], ["p"], kernel_shape=[2, 2]), node("Conv", ["p", "wd"], ["y"])],
            EIGHT,
            "quantized",
            id="values moved",
        ),
        pytest.param(
            [*ON_GRID, DEQUANTIZED, node("Sigmoid", ["xd"], ["p"]), node("Conv", ["p", "wd"], ["y"])],
            EIGHT,
            "weights_only",
            id="values changed",
        ),
        pytest.param(
            [
                *ON_GRID,
                node("QuantizeLinear", ["w", "scale", "zero"], ["wq"]),
                node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
                node("Conv", ["xd", "wd"], ["y"]),
            ],
            {**EIGHT, "w": KERNEL},
            "quantized",
            id="weights stored as floats before Q/DQ",
        ),
        pytest.param(
            [
                node("Cast", ["w8"], ["indices"], to=TensorProto.INT32),
                node("Gather", ["table", "indices"], ["wd"]),
                node("Conv", ["x", "wd"], ["y"]),
            ],
            {**EIGHT, "table": np.ones(4, np.float32)},
            "weights_only",
            id="codebook",
        ),
        pytest.param(
            [
                node("Constant", [], ["half"], value=numpy_helper.from_array(KERNEL.astype(np.float16))),
                node("Cast", ["half"], ["w"], to=TensorProto.FLOAT),
                node("Conv", ["x", "w"], ["y"]),
            ],
            {},
            "weights_only",
            id="half precision",
        ),
        pytest.param(
            [
                node("Reshape", ["x", "flat"], ["rows"]),
                node("MatMulNBits", ["rows", "w8", "scale"], ["y"], domain="com.microsoft"),
            ],
            {**EIGHT, "flat": np.array([-1, 8])},
            "weights_only",
            id="packed",
        ),
        pytest.param(
            [node("ConvInteger", ["xq", "w8"], ["y"])],
            {**EIGHT, "xq": np.ones((1, 3, 8, 8), np.uint8)},
            "quantized",
            id="integer operator",
        ),
    ],
)
def test_layers_are_told_apart(nodes: list[onnx.NodeProto], stored: Stored, group: str, tmp_path: Path) -> None:
    found = surveyed(tmp_path / "hand.onnx", nodes, stored)
    groups = {"quantized": found.quantized, "weights_only": found.weights_only, "floats": found.floats}
    assert {name: sum(counted.values()) for name, counted in groups.items()} == dict.fromkeys(groups, 0) | {group: 1}
    assert found.operators == len(nodes)


def test_branches_and_functions_are_looked_into(tmp_path: Path) -> None:
    convolution = node("Conv", ["x", "w"], ["y"])
    branch = helper.make_graph([convolution], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    choice = node("If", ["always"], ["y"], then_branch=branch, else_branch=branch)
    found = surveyed(tmp_path / "if.onnx", [choice], {"w": KERNEL, "always": np.array(True)})
    assert (found.operators, found.floats) == (3, {"Conv": 2})
    function = helper.make_function("local", "Block", ["x", "w"], ["y"], [convolution], [helper.make_opsetid("", 17)])
    calls = [node("Block", ["x", "w"], ["y"], domain="local")]
    found = surveyed(tmp_path / "function.onnx", calls, {"w": KERNEL}, functions=[function])
    assert found.floats == {"Conv": 1}


@pytest.mark.parametrize(
    ("nodes", "ends_in_softmax"),
    [
        ([node("Softmax", ["x"], ["y"])], True),
        ([node("Softmax", ["x"], ["s"]), node("Flatten", ["s"], ["y"])], True),
        ([node("Softmax", ["x"], ["s"]), node("Relu", ["s"], ["y"])], False),
        ([node("LogSoftmax", ["x"], ["y"])], False),
        ([node("Flatten", ["x"], ["y"])], False),
    ],
)
def test_probabilities_are_what_a_softmax_gives(nodes: list[onnx.NodeProto], ends_in_softmax: bool, tmp_path: Path) -> None:
    assert surveyed(tmp_path / "hand.onnx", nodes, {}).probabilities == (["y"] if ends_in_softmax else [])


def test_numbers_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "hand.onnx"
    stored = {**EIGHT, "w": np.ones((5, 3, 10, 10), np.float32)}
    nodes = [node("Conv", ["x", "w"], ["y"])]
    found = surveyed(path, nodes, stored)
    assert found.numbers == {"float32": 1501, "int8": 13}
    assert (found.path, found.bytes) == (str(path), path.stat().st_size)
    onnx.save(onnx.load(path), tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    outside = contents(tmp_path / "outside.onnx")
    assert outside.numbers == found.numbers
    assert (tmp_path / "weights.bin").stat().st_size >= 6000
    assert outside.bytes == sum((tmp_path / name).stat().st_size for name in ("outside.onnx", "weights.bin"))


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network\n" * 9)
    with pytest.raises(ModelError, match=r"text\.onnx: is not an ONNX file"):
        contents(tmp_path / "text.onnx")


def test_files_of_this_package(digits: Path, tmp_path: Path) -> None:
    assert contents(digits / FOLDED).floats == {"Conv": 9, "Gemm": 1}
    network = dreamquant.load(digits / FOLDED)
    samples = dreamquant.synthesize(network, 4, method="noise")
    for bits, kind in (("W8A8", "int8"), ("W4A4", "int4")):
        student = dreamquant.quantize(network, samples, bits=bits)
        found = contents(dreamquant.export(student, tmp_path / f"{bits}.onnx", samples).path)
        assert (found.quantized, found.weights_only, found.floats) == ({"Conv": 9, "Gemm": 1}, {}, {})
        assert next(iter(found.numbers)) == kind


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"quant_format": QuantFormat.QDQ}, {"Conv": 9, "Gemm": 1}),
        ({"quant_format": QuantFormat.QOperator}, {"QGemm": 1, "QLinearConv": 9}),
    ],
)
def test_files_of_onnx_runtime(
    options: dict[str, Any],
    quantized: dict[str, int],
    images: Callable[..., torch.Tensor],
    digits: Path,
    tmp_path: Path,
) -> None:
    model = onnx.load(digits / FOLDED)  # in memory: no advice on its preprocessing is printed
    reader = CalibrationReader(Samples(images(4, (1, 16, 16))), "input")
    quantize_static(model, str(tmp_path / "int8.onnx"), reader, **options)
    found = contents(tmp_path / "int8.onnx")
    assert (found.quantized, found.weights_only, found.floats) == (quantized, {}, {})
