"""What a tensor that stays in float costs: no grid that serves nobody, no weights that are dequantized in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dreamquant.exporters.export import export
from dreamquant.exporters.qdq import to_onnx
from dreamquant.network.capture import capture
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples

SHAPE = (3, 9, 8)
MUL, MUL_1 = "mul_4_grid", "mul_11_grid"  # as the capture names them


class Gated(nn.Module):
    """Three convolutions, the first two with SiLU behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x * torch.sigmoid(x))
        found: Tensor = self.third(x * torch.sigmoid(x)).mean((2, 3))
        return found


def student_of(bits: str = "W8A8", **changes: Any) -> tuple[Student, Samples]:
    torch.manual_seed(0)
    samples = Samples(torch.randn(16, *SHAPE))
    return quantize(capture(Gated().eval(), SHAPE), samples, bits=bits, plan="deploy", **changes), samples


def grids(student: Student) -> list[str]:
    return [str(tensor.quantizer.target) for tensor in student.tensors() if tensor.kind == "activation"]


def stored(proto: onnx.ModelProto) -> list[bool]:
    """Of each convolution whether its weights are stored floats."""
    floats = {tensor.name for tensor in proto.graph.initializer if numpy_helper.to_array(tensor).dtype == np.float32}
    return [node.input[1] in floats for node in proto.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize(
    ("spared", "gone"),
    [
        ([], []),
        (["conv2d_grid"], ["x_grid", "conv2d_grid", "sigmoid_grid"]),
        (["conv2d_grid", MUL], ["x_grid", "conv2d_grid", "sigmoid_grid", MUL]),
        (["x_grid"], ["x_grid"]),
        ([MUL_1], [MUL_1, "conv2d_2_grid"]),
    ],
    ids=lambda names: ",".join(names) or "none",
)
def test_a_grid_between_float_tensors_goes_with_them(spared: list[str], gone: list[str]) -> None:
    student, _ = student_of(float_tensors=spared)

    left = [name for name in grids(student_of()[0]) if name not in gone]
    assert grids(student) == left
    assert set(gone) <= set(grids(student_of()[0]))


@pytest.mark.parametrize(
    ("spared", "in_float"),
    [
        ([], [False, False, False]),
        (["conv2d_grid"], [True, False, False]),
        (["conv2d_grid", MUL], [True, True, False]),
        ([MUL_1], [False, False, True]),
    ],
    ids=lambda names: ",".join(map(str, names)) or "none",
)
def test_layers_that_have_to_run_in_float_store_floats_on_their_levels(
    spared: list[str], in_float: list[bool], tmp_path: Path
) -> None:
    student, samples = student_of(float_tensors=spared)

    proto = to_onnx(student).proto

    assert stored(proto) == in_float
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    names = [node.input[1] for node in proto.graph.node if node.op_type == "Conv"]
    levels = [tensor for tensor in student.tensors() if tensor.kind == "weight"]
    for name, tensor, floats in zip(names, levels, in_float, strict=True):
        if floats:
            assert isinstance(tensor.grid, Grid)
            expected = tensor.grid.fake(getattr(student.network.graph, str(tensor.node.target)))
            assert np.array_equal(weights[name], expected.numpy())
    proof = export(student, tmp_path / "gated.onnx", samples).verification
    assert proof.steps.same
    assert proof.written.same


def test_few_bits_are_stored_as_such_wherever_they_run() -> None:
    student, _ = student_of("W4A8", float_tensors=["conv2d_grid", MUL], first_weight_bits=4, last_weight_bits=4)

    assert stored(to_onnx(student).proto) == [False, False, False]
