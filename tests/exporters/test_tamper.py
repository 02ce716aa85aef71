"""Whatever is done to a file, the proof finds it out, and lets the file pass to which nothing was done."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from benchmarks.tamper import PLACES, TAMPERS, spoilt, verdict
from torch import Tensor, nn

from dreamquant.exporters.qdq import OnnxStudent, to_onnx
from dreamquant.exporters.verify import verify
from dreamquant.network.capture import capture
from dreamquant.network.load import load
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

Made = tuple[Student, OnnxStudent, Tensor]


@pytest.fixture(scope="module", params=["W8A8", "W4A4"])
def made(request: pytest.FixtureRequest, digits: Path) -> Made:
    """The digits network's student, its file, and images."""
    network = load(digits / "digits_bnfolded.onnx")
    samples = synthesize(network, 4, method="fractal", seed=0)
    student = quantize(network, samples, bits=request.param)
    return student, to_onnx(student), samples.images


class Heads(nn.Module):
    """Class scores, whole numbers, and what has its images along axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.places = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x).relu()
        scores = self.head(x.mean((2, 3)))
        return scores, scores.argmax(1), self.places(x).flatten(2).permute(2, 0, 1).sigmoid()


@pytest.fixture(scope="module")
def heads() -> Made:
    torch.manual_seed(0)
    network = capture(Heads().eval(), (3, 9, 7))
    images = torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    student = quantize(network, Samples(images), bits="W8A8")
    return student, to_onnx(student), images


def refused(made: Made, tamper: str, place: str) -> str | None:
    """What is said against a file; None where it cannot be spoilt so."""
    student, file, images = made
    proto = spoilt(file.proto, tamper, place)
    return None if proto is None else verdict(student, proto, file, images)


def test_a_file_to_which_nothing_was_done_passes(made: Made, heads: Made) -> None:
    assert refused(made, "nothing", "") == ""
    assert refused(heads, "nothing", "") == ""


@pytest.mark.parametrize("tamper", TAMPERS)
def test_a_spoilt_file_is_refused(made: Made, tamper: str) -> None:
    found = [said for place in PLACES if (said := refused(made, tamper, place)) is not None]
    assert found
    assert all("does not do what was measured" in said and "\n" not in said for said in found)


@pytest.mark.parametrize("tamper", TAMPERS)
def test_a_spoilt_file_is_refused_by_what_it_computes_alone(made: Made, tamper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[verify.__module__], "read_back", lambda *_: 0)
    found = [said for place in PLACES if (said := refused(made, tamper, place)) is not None]
    assert all("part" in said for said in found)


@pytest.mark.parametrize("index", range(3))
def test_no_output_of_several_may_be_another(heads: Made, index: int) -> None:
    student, file, images = heads
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    name = proto.graph.output[index].name
    node = next(node for node in proto.graph.node if name in node.output)
    node.output[list(node.output).index(name)] = "untouched"
    for other in proto.graph.node:
        other.input[:] = ["untouched" if value == name else value for value in other.input]
    proto.graph.node.append(onnx.helper.make_node("Sub", ["untouched", "untouched"], [name]))

    assert f"only the outputs part: {name}" in verdict(student, proto, file, images)


def test_what_no_image_wakes_is_read_back() -> None:
    """A filter whose output is 0 on every image: nothing that is computed tells of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        module[0].bias[1] = -1e3  # type: ignore[index, union-attr]
    samples = Samples(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    student = quantize(capture(module, (3, 5, 5)), samples, bits="W8A8", bias_correction="none")
    file = to_onnx(student)
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    tensor = next(
        tensor for tensor in proto.graph.initializer if tensor.name.endswith("_q") and list(tensor.dims) == [4, 3, 1, 1]
    )
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[1] += 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    assert "of its weight" in verdict(student, proto, file, samples.images)
