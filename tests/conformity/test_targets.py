"""Every target x every kind of network: quantized, proven in ONNX Runtime, and held to the target's rules as a file on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from dreamquant.conformity import check
from dreamquant.errors import OptionError, UnsupportedOperator
from dreamquant.exporters.export import export
from dreamquant.flow import run
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.plan import change_plan, load_plan, parse_bits, target_names
from dreamquant.quantization.quantize import quantize
from dreamquant.report.verdict import verdict
from dreamquant.samples import Samples

SHAPE = (3, 12, 8)
ATTENTION, DETECTOR = "transformer", "detector"


class Detector(nn.Module):
    """A residual block, two scales of different resolution joined, boxes and the probabilities of classes side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.block, self.low = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3, 2, 1)
        self.side = nn.Conv2d(24, 16, 1)
        self.boxes, self.classes = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 3, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.block(x))
        low = nn.functional.silu(self.low(x))
        joined = torch.cat([x, self.up(self.side(low))], 1)
        return torch.cat([self.boxes(joined), torch.sigmoid(self.classes(joined))], 1).flatten(2)


class Depthwise(nn.Module):
    """Depthwise convolutions, a gate, an average of half of the image, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.point = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.Conv2d(16, 24, 1),
        )
        self.gate, self.head = nn.Conv2d(24, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        x = nn.functional.relu6(self.point(nn.functional.relu6(self.depthwise(x))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        scores: Tensor = self.head(nn.functional.avg_pool2d(x, 2).mean((2, 3)))
        return scores.softmax(1)


def classifier() -> nn.Module:
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


@pytest.fixture(scope="module")
def networks(fill: Callable[..., nn.Module], transformer: Network) -> dict[str, Network]:
    built = {"classifier": classifier(), DETECTOR: Detector(), "depthwise": Depthwise()}
    return {name: capture(fill(module, SHAPE), SHAPE) for name, module in built.items()} | {ATTENTION: transformer}


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("kind", ["classifier", DETECTOR, "depthwise", ATTENTION])
def test_files_are_proven_and_keep_the_rules(
    networks: dict[str, Network], images: Callable[..., Tensor], tmp_path: Path, target: str, kind: str
) -> None:
    network, plan = networks[kind], load_plan(target)
    assert plan.target is not None
    samples, path = Samples(images(6, SHAPE)), tmp_path / "file.onnx"

    artifact = export(quantize(network, samples, plan=target, bits=plan.target.bits), path, samples)

    assert artifact.verification.written.same
    found = check(path, target)
    assert found.conforms, found.findings
    assert set(found.counts) == set(plan.target.rules)
    assert onnx.load(path).metadata_props


def test_a_network_of_an_onnx_file_keeps_the_rules_too(
    residual_onnx: Path, images: Callable[..., Tensor], tmp_path: Path
) -> None:
    network = load(residual_onnx, pixels="none")
    samples = Samples(images(4, network.input_shape))
    for target in ("qnn", "tflite", "amd-xint8", "tensorrt"):
        export(quantize(network, samples, plan=target), tmp_path / "file.onnx", samples)
        assert check(tmp_path / "file.onnx", target).conforms


def test_each_target_has_its_mark(networks: dict[str, Network], images: Callable[..., Tensor], tmp_path: Path) -> None:
    """A file for one target breaks the rules of those that differ from it, and names nodes."""
    samples, files = Samples(images(4, SHAPE)), {}
    for target in ("onnxruntime", "tensorrt", "qnn", "tflite", "amd-xint8"):
        files[target] = tmp_path / f"{target}.onnx"
        export(quantize(networks["classifier"], samples, plan=target), files[target], samples)

    for target in files:
        for other, path in files.items():
            assert check(path, target).conforms == (target == other), (target, other)


def test_a_run_says_what_its_file_is_for(digits: Path, tmp_path: Path, command: Callable[..., object]) -> None:
    path = tmp_path / "file.onnx"
    said: list[str] = []
    result = run(digits / "digits_bnfolded.onnx", path, target="qnn", estimate=False, announce=said.append)

    assert result.artifact.conformity is not None
    assert result.artifact.conformity.sentence() == (
        "conforms to qnn's rules (QNN HTP), proven in ONNX Runtime, not run on the target"
    )
    assert result.summary()["target"]["conforms"]
    assert result.assessment.made_for == "QNN HTP"
    assert result.assessment.fast  # whatever ONNX Runtime needs for it
    assert "nothing is known of QNN HTP, which it is for" in verdict(result.assessment).gained
    assert "without spare, which qnn does not let it change" in said[-1]
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["dreamquant.target"] == "qnn (QNN HTP)"
    assert "float_tensors" not in properties["dreamquant.run"]


def test_a_target_gives_the_bits(digits: Path, tmp_path: Path) -> None:
    result = run(digits / "digits_bnfolded.onnx", tmp_path / "file.onnx", target="tflite-16x8", estimate=False)

    assert result.recipe.quantization.bits == "W8A16"
    assert {str(found.grid.bits) for found in result.student.tensors() if found.kind == "activation"} == {"16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "qnn", "plan": "deploy"}, "a target is a plan, name one of them"),
        ({"target": "deploy"}, "plan deploy is no target's; targets: amd-xint8"),
        ({"target": "tensort"}, "did you mean 'tensorrt'"),
        ({"target": "tensorrt", "bits": "W8A4"}, "tensorrt has no 4-bit activations; bits are W8A4, known: 8"),
        ({"target": "qnn", "settings": ["quantization.bias=float"]}, "plan qnn: bias cannot be changed"),
        ({"target": "qnn", "settings": ["quantization.image_bits=4"]}, "plan qnn: image_bits cannot be changed"),
        ({"target": "tensorrt", "fastest": True}, "leave fastest out"),
        ({"target": "qnn", "recipe": "gdfq"}, "gdfq trains grids"),
        ({"target": "amd-xint8", "settings": ["reconstruction.method=qdrop"]}, "powers of two in amd-xint8"),
    ],
)
def test_what_a_target_cannot_be_is_told(digits: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        run(digits / "digits_bnfolded.onnx", tmp_path / "file.onnx", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_rule_that_a_network_cannot_keep_names_the_layer(digits: Path, tmp_path: Path) -> None:
    kept = ["quantization.layers.conv2d.keep_float=true"]
    with pytest.raises(UnsupportedOperator, match=r"qnn's rules are not met: placement: Conv .*in float") as caught:
        run(digits / "digits_bnfolded.onnx", tmp_path / "file.onnx", target="qnn", settings=kept)
    assert "\n" not in str(caught.value)


def test_a_plan_of_a_target_is_not_changed_by_hand(networks: dict[str, Network], images: Callable[..., Tensor]) -> None:
    with pytest.raises(OptionError, match="plan tensorrt: weight_narrow cannot be changed"):
        change_plan(load_plan("tensorrt"), weight_narrow=True)
    with pytest.raises(OptionError, match="tflite has no 16-bit activations"):
        quantize(networks["classifier"], Samples(images(2, SHAPE)), plan="tflite", bits=str(parse_bits("W8A16")))


def test_the_command_lists_rules_and_tells_by_its_status(
    networks: dict[str, Network], images: Callable[..., Tensor], tmp_path: Path, command: Callable[..., Any]
) -> None:
    samples, path = Samples(images(4, SHAPE)), tmp_path / "file.onnx"
    export(quantize(networks["classifier"], samples, plan="qnn"), path, samples)

    kept, broken = command("check", path, "--target", "qnn"), command("check", path, "--target", "tensorrt", "--json")

    assert (kept.status, broken.status) == (0, 1)
    assert "keeps all rules of qnn (QNN HTP)" in kept.out
    told = json.loads(broken.out)
    assert not told["conforms"]
    assert told["counts"]["types"] > 0
    assert any("Conv" in finding["node"] for finding in told["findings"] if finding["rule"] == "bias")
    missing = command("check", tmp_path / "absent.onnx", "--target", "qnn")
    assert (missing.status, missing.err.count("\n")) == (2, 1)
