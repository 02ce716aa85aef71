"""Files that take images in bytes, in half precision or channels last go out as they came in, and prove themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import dreamquant
from dreamquant.exporters.qdq import to_onnx
from dreamquant.exporters.verify import verify


def network(dtype: int, layout: str) -> onnx.ModelProto:
    """Two convolutions and a pooling, behind the Cast and the Transpose that the input asks for."""
    nodes, value = [], "x"
    weights = np.random.default_rng(0)
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "w2": (10, 8, 3, 3), "b2": (10,)}
    stored = {name: (0.2 * weights.standard_normal(shape)).astype(kind) for name, shape in shapes.items()}
    if dtype == TensorProto.UINT8:
        stored["k"] = np.float32(1 / 255)
        nodes += [helper.make_node("Cast", [value], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "k"], ["m"])]
        value = "m"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [value], ["t"], perm=[0, 3, 1, 2]))
        value = "t"
    nodes += [
        helper.make_node("Conv", [value, "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2", "b2"], ["c2"]),
        helper.make_node("GlobalAveragePool", ["c2"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    sizes = ("N", 12, 14, 3) if layout == "NHWC" else ("N", 3, 12, 14)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", dtype, sizes)],
        [helper.make_tensor_value_info("y", dtype if kind == np.float16 else TensorProto.FLOAT, ("N", 10))],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8], ids=["float", "half", "bytes"])
def test_a_file_takes_what_the_network_took(dtype: int, layout: str, tmp_path: Path) -> None:
    given = network(dtype, layout)
    onnx.save(given, tmp_path / "given.onnx")
    pixels = "0..255" if dtype == TensorProto.UINT8 else "0..1"
    result = dreamquant.run(
        tmp_path / "given.onnx", tmp_path / "out.onnx", pixels=pixels, settings=["synthesis.count=8"], estimate=False
    )
    made = onnx.load(tmp_path / "out.onnx")

    assert made.graph.input[0] == given.graph.input[0]
    assert made.graph.output[0] == given.graph.output[0]
    assert result.artifact.verification.written.same
    assert result.network.space.layout == layout
    assert result.assessment.agreement.top1 > 90


def test_a_half_precision_output_that_is_further_off_than_its_type_rounds_is_refused(tmp_path: Path) -> None:
    onnx.save(network(TensorProto.FLOAT16, "NCHW"), tmp_path / "given.onnx")
    found = dreamquant.load(tmp_path / "given.onnx", pixels="0..1")
    samples = dreamquant.synthesize(found, 8, method="fractal")
    student = dreamquant.quantize(found, samples)
    proto, integers, stored, *_ = to_onnx(student)
    cast = next(node for node in proto.graph.node if node.output[0] == "y")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "more"))
    proto.graph.node.insert(len(proto.graph.node) - 1, helper.make_node("Mul", [cast.input[0], "more"], ["spoilt"]))
    cast.input[0] = "spoilt"
    onnx.save(proto, tmp_path / "spoilt.onnx")
    with pytest.raises(dreamquant.DreamQuantError, match="only the outputs part: y"):
        verify(student, tmp_path / "spoilt.onnx", samples.images, integers, stored)
