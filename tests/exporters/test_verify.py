"""A file that does not do what was measured is found out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dreamquant.errors import ModelError, VerificationError
from dreamquant.exporters import verify as verifying
from dreamquant.exporters.following import furthest
from dreamquant.exporters.qdq import Stored, to_onnx
from dreamquant.exporters.verify import PROVED, _kept, verify
from dreamquant.network.graph import Network, output_nodes
from dreamquant.network.load import load
from dreamquant.network.notes import shape_of
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.runtime import OnnxRunner
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W4A4")


@pytest.fixture(scope="module")
def eight(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W8A8")


def weights_and_scales(proto: onnx.ModelProto) -> list[tuple[str, onnx.TensorProto]]:
    """The names of the weights' integers and the tensors of their scales."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    dequantized = [node.input for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    return [(weight, stored[scale]) for weight, scale, *_ in dequantized if weight in stored and len(stored[weight].dims) > 1]


def written(
    student: Student, folder: Path, tampered: int | None = None, by: float = 8
) -> tuple[Path, Mapping[str, str], Mapping[str, Stored]]:
    """The student's file and its integers' names; the weights of one layer may be some times what they should be."""
    proto, integers, stored, *_ = to_onnx(student)
    if tampered is not None:
        _, tensor = weights_and_scales(proto)[tampered]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(by), tensor.name))
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path, integers, stored


def test_inner_values_that_are_asked_for_one_by_one_are_the_same(
    residual: Network, calibration: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = quantize(residual, calibration)
    path, integers, stored = written(student, tmp_path)
    together = verify(student, path, calibration.images, integers, stored)
    runs: list[int] = []
    monkeypatch.setattr(verifying, "ASKED", 1)
    run = OnnxRunner.run
    monkeypatch.setattr(OnnxRunner, "run", lambda runner, images, names: runs.append(len(names)) or run(runner, images, names))
    apart = verify(student, path, calibration.images, integers, stored)

    assert len(runs) > 2 * len(integers)
    assert max(runs) <= 1 + len(together.outputs)
    assert apart == together


@pytest.mark.parametrize("bits", ["W4A4", "W8A8"])
def test_a_true_file_passes_and_says_how_near_it_is(bits: str, residual: Network, calibration: Samples, tmp_path: Path) -> None:
    student = quantize(residual, calibration, bits=bits)
    path, integers, stored = written(student, tmp_path)
    found = verify(student, path, calibration.images, integers, stored)

    assert found.samples == len(calibration)
    assert found.top1_agreement == 100.0
    assert found.mean_difference <= found.largest_difference < 1e-5
    inside = [tensor for tensor in student.tensors() if tensor.kind == "activation"]
    assert set(integers) == {tensor.quantizer.name for tensor in inside}
    shown = len(calibration.images[:: -(-len(calibration) // PROVED)])
    assert len(calibration) > PROVED
    assert found.steps.values == shown * sum(torch.Size(shape_of(tensor.node)[1:]).numel() for tensor in inside)
    assert found.steps.apart == {}
    assert found.steps.borders < 1e-4 * found.steps.values
    assert found.steps.top1_agreement == 100.0
    assert found.steps.largest_difference < 1e-5
    assert found.written.same
    assert found.steps.same
    assert [output.largest for output in found.outputs] == [found.largest_difference]
    assert found.stored == 2 * 2 * len(inside) + len(student.tensors()) - len(inside)


def test_where_rounding_moves_the_outputs_every_layer_is_held_against_the_student(data_dir: Path, tmp_path: Path) -> None:
    """A deep network of a thousand near classes: its own sums round some values to the other side of a border."""
    network = load(data_dir / "imagenet/mobilenetv1_025.pt2", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    samples = synthesize(network, 16, method="fractal", seed=0)
    student = quantize(network, samples, bits="W8A8", plan=load_plan("deploy", weight_granularity="tensor"))
    path, integers, stored = written(student, tmp_path)
    found = verify(student, path, samples.images, integers, stored)

    assert 0 < found.steps.borders < 1e-5 * found.steps.values
    assert found.steps.apart == {}
    assert found.steps.top1_agreement == 100.0
    assert found.steps.largest_difference < 1e-3 * found.largest_difference


@pytest.mark.parametrize("tampered", [0, 4, 8])
def test_a_tampered_file_fails(student: Student, calibration: Samples, tmp_path: Path, tampered: int) -> None:
    path, integers, stored = written(student, tmp_path, tampered)
    with pytest.raises(
        VerificationError, match=r"does not do what was measured: .* of its weight \w+ are not the student's"
    ) as caught:
        verify(student, path, calibration.images, integers, stored)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tampered", range(9))
def test_a_tampered_layer_is_named_by_what_it_computes(
    eight: Student, calibration: Samples, tmp_path: Path, tampered: int
) -> None:
    """However little, and without a look at what is stored: the outputs of the whole network need not tell."""
    path, integers, _ = written(eight, tmp_path, tampered, by=1.01)
    with pytest.raises(VerificationError, match=r"part from the student's, first at (\w+)|only the outputs part") as caught:
        verify(eight, path, calibration.images, integers, {})
    weight = weights_and_scales(onnx.load(path))[tampered][0].replace(".", "_").removesuffix("_q") + "_grid"
    named = re.search(r"first at (\w+)", str(caught.value))
    nodes = {node.name: node for node in eight.network.graph.graph.nodes}
    reached = nodes[named[1]] if named else next(iter(output_nodes(eight.network.graph.graph)))
    read = {argument.name for node in (reached, *reached.all_input_nodes) for argument in node.all_input_nodes}
    assert weight in read


def test_a_file_that_the_runtime_refuses_fails(student: Student, calibration: Samples, tmp_path: Path) -> None:
    path, integers, stored = written(student, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx"):
        verify(student, path, calibration.images, integers, stored)


def test_classes_of_equal_scores_share_their_rank() -> None:
    expected = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    actual = torch.tensor([[2.0, 2.0000005, 0.0], [2.0, 2.00002, 0.0], [2.0, 1.0, 0.0]])
    assert _kept(expected, actual).tolist() == [True, False, True]
    assert _kept(expected.unsqueeze(-1), actual.unsqueeze(-1)).shape == (3, 1)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5)])
def test_outputs_of_any_kind_have_a_rank(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(kind)
    assert _kept(values, values).all()


def test_nothing_is_at_no_distance() -> None:
    assert furthest(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert furthest(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 3.0])) == 2
