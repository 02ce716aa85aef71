"""A file that does not do what was measured is found out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dreamquant.errors import ModelError, VerificationError
from dreamquant.export.qdq import to_onnx
from dreamquant.export.verify import _kept, verify
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W4A4")


def written(student: Student, folder: Path, tampered: int | None = None) -> Path:
    """The student's file; the weights of one layer are eight times what they should be."""
    proto = to_onnx(student)
    if tampered is not None:
        stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        dequantized = [node.input for node in proto.graph.node if node.op_type == "DequantizeLinear"]
        scales = [scale for weight, scale, *_ in dequantized if weight in stored and len(stored[weight].dims) > 1]
        scale, tensor = scales[tampered], stored[scales[tampered]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(8), scale))
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def test_a_true_file_passes_and_says_how_near_it_is(student: Student, calibration: Samples, tmp_path: Path) -> None:
    found = verify(student, written(student, tmp_path), calibration.images)

    assert found.samples == len(calibration)
    assert found.top1_agreement == 100.0
    assert found.mean_difference <= found.largest_difference < 1e-5
    assert found.precision == "single"
    assert found.rounding_agreement is found.rounding_difference is None


def test_integer_sums_are_held_against_exact_ones(data_dir: Path, tmp_path: Path) -> None:
    """A deep network of a thousand near classes: single precision rounds some values to the other side of a border."""
    network = load(data_dir / "imagenet/mobilenetv1_025.pt2", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    samples = synthesize(network, 16, method="fractal", seed=0)
    student = quantize(network, samples, bits="W8A8", plan=load_plan("deploy", weight_granularity="tensor"))
    found = verify(student, written(student, tmp_path), samples.images)

    assert found.top1_agreement == 100.0
    assert found.precision == "single" or (found.rounding_difference or 0) > found.mean_difference


@pytest.mark.parametrize("tampered", [0, 4, 8])
def test_a_tampered_file_fails(student: Student, calibration: Samples, tmp_path: Path, tampered: int) -> None:
    path = written(student, tmp_path, tampered)
    with pytest.raises(VerificationError, match=r"does not do what was measured.*where rounding explains") as caught:
        verify(student, path, calibration.images)
    assert "\n" not in str(caught.value)


def test_a_file_that_the_runtime_refuses_fails(student: Student, calibration: Samples, tmp_path: Path) -> None:
    path = written(student, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx"):
        verify(student, path, calibration.images)


def test_classes_of_equal_scores_share_their_rank() -> None:
    expected = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    actual = torch.tensor([[2.0, 2.0000005, 0.0], [2.0, 2.00002, 0.0], [2.0, 1.0, 0.0]])
    assert _kept(expected, actual).tolist() == [True, False, True]
    assert _kept(expected.unsqueeze(-1), actual.unsqueeze(-1)).shape == (3, 1)
