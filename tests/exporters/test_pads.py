"""Zeros around a tensor cost nothing in the file, whoever adds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import VerificationError
from dreamquant.exporters.export import export
from dreamquant.exporters.qdq import to_onnx
from dreamquant.exporters.readback import read_back
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.onnx_import import load_onnx
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples

SHAPE = (3, 9, 8)


class Padded(nn.Module):
    """A layer, zeros of given sizes, and what reads them; with a last layer behind."""

    def __init__(self, sizes: tuple[int, ...], reader: nn.Module, *, flat: bool = False) -> None:
        super().__init__()
        self.stem, self.reader, self.sizes, self.flat = nn.Conv2d(3, 4, 3), reader, sizes, flat
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(x), 0.5)
        x = self.reader(F.pad(x.flatten(2) if self.flat else x, self.sizes))
        found: Tensor = self.head(torch.flatten(F.relu(x), 1))
        return found


def student_of(module: nn.Module, **changes: Any) -> tuple[Student, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(16, *SHAPE)
    with torch.no_grad():
        module.eval()(images)
    return quantize(capture(module, SHAPE), Samples(images), bits="W8A8", plan="deploy", **changes), images


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def executed(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options)
    return operators(onnx.load(options.optimized_model_filepath))


CONVOLUTIONS = {
    "as TensorFlow pads": ((0, 1, 0, 1), lambda: nn.Conv2d(4, 4, 3, stride=2)),
    "alike": ((1, 1, 2, 2), lambda: nn.Conv2d(4, 4, 3, groups=4)),
    "one axis": ((2, 0), lambda: nn.Conv2d(4, 4, 3)),
    "more of it": ((0, 1, 0, 1), lambda: nn.Conv2d(4, 4, 3, padding=1)),
    "average": ((0, 1, 1, 0), lambda: nn.AvgPool2d(3, 2)),
    "average, more of it": ((0, 1, 0, 1), lambda: nn.AvgPool2d(3, 2, padding=1)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_what_reads_zeros_adds_them_itself(case: str, tmp_path: Path) -> None:
    sizes, reader = CONVOLUTIONS[case]
    student, images = student_of(Padded(sizes, reader()))

    pads = [node.all_input_nodes[0].name for node in quantizer_nodes(student.network.graph.graph)]
    assert not any(name.startswith("pad") for name in pads)
    proto = to_onnx(student).proto
    onnx.checker.check_model(proto, full_check=True)
    assert not operators(proto)["Pad"]
    assert not executed(proto, tmp_path)["Conv"]
    proof = export(student, tmp_path / "padded.onnx", Samples(images)).verification
    assert proof.steps.same
    assert proof.written.same


def test_zeros_in_one_dimension_are_added_by_the_convolution() -> None:
    student, images = student_of(Padded((2, 1), nn.Conv1d(4, 4, 3), flat=True))

    proto = to_onnx(student).proto

    assert not operators(proto)["Pad"]
    read = onnx_runner(proto.SerializeToString(), optimize=False)(images.numpy())
    assert torch.allclose(torch.from_numpy(read), student(images), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "reader"),
    [
        ((0, 1, 0, 1), lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
        ((0, 1, 0, 1), lambda: nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)),
        ((0, 3, 0, 0), lambda: nn.AvgPool2d(3, 2)),
        ((0, 1, 0, 1), lambda: nn.MaxPool2d(3, 2)),
        ((0, 0, 0, 0, 1, 1), lambda: nn.Conv2d(6, 4, 3)),
    ],
    ids=["own zeros do not count", "rounded up", "a window of zeros alone", "largest", "channels of zeros"],
)
def test_zeros_that_no_layer_can_add_are_added_to_the_integers(
    sizes: tuple[int, ...], reader: Callable[[], nn.Module], tmp_path: Path
) -> None:
    student, images = student_of(Padded(sizes, reader()))

    proto = to_onnx(student).proto

    integers = {node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert [node.input[0] in integers for node in proto.graph.node if node.op_type == "Pad"] == [True]
    onnx.checker.check_model(proto, full_check=True)
    proof = export(student, tmp_path / "padded.onnx", Samples(images)).verification
    assert proof.steps.same
    assert proof.written.same


@pytest.mark.parametrize(("value", "mode"), [(1.0, "constant"), (None, "reflect")])
def test_what_is_not_zero_is_padded_as_before(value: float | None, mode: str, tmp_path: Path) -> None:
    class Other(Padded):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.reader(F.pad(self.stem(x), self.sizes, mode, value)).flatten(1))
            return found

    student, images = student_of(Other((0, 1, 0, 1), nn.Conv2d(4, 4, 3)))

    assert operators(to_onnx(student).proto)["Pad"] == 1
    assert export(student, tmp_path / "padded.onnx", Samples(images)).verification.steps.same


def test_zeros_that_others_see_stay() -> None:
    class Seen(Padded):
        def forward(self, x: Tensor) -> Tensor:
            padded = F.pad(self.stem(x), self.sizes)
            found: Tensor = self.head((self.reader(padded) + padded[:, :, 2:, 2:]).flatten(1))
            return found

    student, images = student_of(Seen((0, 1, 0, 1), nn.Conv2d(4, 4, 3)))
    proto = to_onnx(student).proto

    assert operators(proto)["Pad"] == 1
    read = onnx_runner(proto.SerializeToString(), optimize=False)(images.numpy())
    assert torch.allclose(torch.from_numpy(read), student(images), atol=1e-5)


ENDS = {mode: (("x", (2, 7, 7)), ("y", (3, *end))) for mode, end in {None: (4, 6), "VALID": (4, 6), "SAME_UPPER": (6, 8)}.items()}


def onnx_of(path: Path, auto_pad: str | None) -> Network:
    """Pad -> Conv, as other exporters write them, of images (2, 7, 7)."""
    draw = np.random.default_rng(0)
    weights = {"first": (3, 2, 3, 3), "second": (3, 3, 3, 3)}
    stored = [numpy_helper.from_array(draw.normal(size=s).astype(np.float32), name) for name, s in weights.items()]
    stored.append(numpy_helper.from_array(np.array([0, 0, 0, 1, 0, 0, 1, 2]), "sizes"))
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Pad", ["b", "sizes"], ["c"]),
        helper.make_node("Conv", ["c", "second"], ["y"], **({} if auto_pad is None else {"auto_pad": auto_pad})),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, *sizes]) for name, sizes in ENDS[auto_pad]]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return load_onnx(path)


@pytest.mark.parametrize("auto_pad", [None, "VALID", "SAME_UPPER"])
def test_zeros_of_a_file_are_added_by_its_convolution(tmp_path: Path, auto_pad: str | None) -> None:
    images = torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    student = quantize(onnx_of(tmp_path / "padded.onnx", auto_pad), Samples(images), bits="W8A8", plan="deploy")

    proto = to_onnx(student).proto

    assert operators(proto)["Pad"] == (auto_pad == "SAME_UPPER")
    read = onnx_runner(proto.SerializeToString(), optimize=False)(images.numpy())
    assert torch.allclose(torch.from_numpy(read), student(images), atol=1e-4)


def test_what_integers_are_padded_with_is_read_back() -> None:
    student, _ = student_of(Padded((0, 1, 0, 1), nn.MaxPool2d(3, 2)))
    file = to_onnx(student)
    pad = next(node for node in file.proto.graph.node if node.op_type == "Pad")
    zero = next(tensor for tensor in file.proto.graph.initializer if tensor.name == pad.input[2])
    other = numpy_helper.from_array(np.asarray(numpy_helper.to_array(zero) + 1), "other")
    file.proto.graph.initializer.append(other)
    read_back(student, file.proto, file.integers, file.stored)
    pad.input[2] = "other"

    with pytest.raises(VerificationError, match="zero point of pad"):
        read_back(student, file.proto, file.integers, file.stored)
