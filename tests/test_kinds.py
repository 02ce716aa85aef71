"""The whole flow over a small network of each kind of answer: what is said of it is true of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.flow import Result, run
from dreamquant.recipe import load_recipe, resolve
from dreamquant.report.again import command_again
from dreamquant.report.facts import gather

SHAPE = (3, 16, 16)
FEW = ["synthesis.count=8", "synthesis.held_out=4"]


class Net(nn.Module):
    """A convolution with BatchNorm, and a head for each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.map, self.step = nn.Linear(8, 6), nn.Conv2d(8, 9, 1), nn.Linear(8 * 16, 7)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        pooled = self.head(x.mean((2, 3)))
        if self.kind == "regions":
            told = self.map(F.avg_pool2d(x, 4)).flatten(2).transpose(1, 2)
            return torch.cat([8 + 4 * told[..., :4].sigmoid(), told[..., 4:].sigmoid()], 2)
        return {
            "classes": lambda: pooled.softmax(1),
            "multilabel": lambda: pooled.sigmoid(),
            "dense classes": lambda: self.map(x),
            "features": lambda: F.normalize(pooled, dim=1),
            "sequence classes": lambda: self.step(x.flatten(1, 2).transpose(1, 2)).transpose(0, 1),
            "values": lambda: pooled[:, :3],
            "two": lambda: (pooled[:, :2], pooled.softmax(1)),
        }[self.kind]()


@pytest.fixture
def quantized(fill: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Result]:
    def made(kind: str, **options: Any) -> Result:
        net = fill(Net(kind), SHAPE)
        options = {"settings": FEW, "budget": "quick", "estimate": False} | options
        return run(net, tmp_path / "q.onnx", input_shape=SHAPE, **options)

    return made


@pytest.mark.parametrize(
    ("kind", "bits", "unit"),
    [
        ("classes", "W8A8", "top-1"),
        ("multilabel", "W8A8", "labels"),
        ("dense classes", "W4A8", "pixels' classes"),
        ("features", "W8A8", "cosine"),
        ("sequence classes", "W4A8", "time steps' classes"),
        ("regions", "W4A8", "boxes, F1"),
        ("values", "W8A8", "100 % less the relative error"),
    ],
)
def test_what_is_said_is_of_the_kind(quantized: Callable[..., Result], kind: str, bits: str, unit: str) -> None:
    result = quantized(kind, bits=bits)
    told = json.loads(json.dumps(result.summary()))

    assert (told["agreement"]["kind"], told["agreement"]["unit"]) == (kind, unit)
    assert 60 < told["agreement"]["top1"] <= 100
    assert told["agreement"]["top1"] == told["agreement"]["outputs"][0]["agreement"]
    assert [output["kind"] for output in told["outputs"]] == [kind]
    classes = kind == "classes"
    assert ("no class" in told["recipe"]["because"]) is (not classes and bits != "W8A8")
    assert classes or told["recipe"]["synthesis"].get("class_weight", 0) == 0
    facts = gather(result)
    page = " ".join([facts.verdict.lost, *facts.cautions, *(note for tile in facts.tiles for note in tile.notes)])
    assert ("right answers" in page) is False
    assert ("the float network's top class" in page) is classes


def test_every_output_is_told_of_and_the_class_output_counts(quantized: Callable[..., Result]) -> None:
    found = quantized("two").assessment.agreement

    assert [(output.name, output.kind) for output in found.outputs] == [("output_0", "values"), ("output_1", "classes")]
    assert (found.kind, found.top1) == ("classes", found.outputs[1].agreement)
    assert found.outputs[0].relative_error is not None
    assert 0 < found.outputs[0].relative_error < 0.5


def test_time_first_stays_time_first_in_the_file(quantized: Callable[..., Result]) -> None:
    path = quantized("sequence classes").artifact.path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.zeros(3, *SHAPE).numpy()
    assert session.run(None, {session.get_inputs()[0].name: images})[0].shape == (16, 3, 7)


def test_an_output_is_stated(quantized: Callable[..., Result]) -> None:
    found = quantized("values", outputs={"output": "features"})
    assert (found.assessment.agreement.kind, found.network.outputs[0].known) == ("features", "stated")
    assert "outputs={'output': 'features'}" in command_again(found)


@pytest.mark.parametrize("method", ["anchored", "dsg", "intraq"])
def test_methods_that_dream_of_classes_are_refused_where_there_are_none(quantized: Callable[..., Result], method: str) -> None:
    with pytest.raises(OptionError, match="no class scores, and this method dreams of classes; its outputs: output ") as caught:
        quantized("features", settings=[*FEW, f"synthesis.method={method}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", ["W8A8", "W4A8"])
@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("photographs", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_auto_asks_for_no_classes_where_there_are_none(bits: str, batchnorm: bool, photographs: bool, large: bool) -> None:
    chosen = resolve(load_recipe("auto"), batchnorm, photographs, large, False, bits=bits).synthesis
    assert chosen.method == "fractal" or (batchnorm and chosen.options["class_weight"] == 0)
