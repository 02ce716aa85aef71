"""A file that is no faster than float says so, names what costs most and, where it is asked to, leaves that in float."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.assess import assess as assessing
from dreamquant.assess.assess import float_file, timed
from dreamquant.assess.fastest import hastened
from dreamquant.assess.latency import Latency
from dreamquant.assess.layer_times import LayerTime, layer_times, layers_of
from dreamquant.exporters.export import export
from dreamquant.flow import run
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.plan import Plan, load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.report.verdict import cautions
from dreamquant.samples import Samples

MODULE = sys.modules["dreamquant.assess.fastest"]
SHAPE, BITS = (3, 12, 12), parse_bits("W8A8")


class Branched(nn.Module):
    """BatchNorm, a gate, two branches that meet, zeros around one; layers have 8 channels, as the runtime's blocked kernels ask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.left, self.right, self.head = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x * torch.sigmoid(x)
        x = F.relu(self.left(F.pad(x, (0, 2, 1, 1))) + self.right(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def branched() -> Network:
    torch.manual_seed(0)
    return capture(Branched().eval(), SHAPE)


def latency(ratio: float) -> Latency:
    return Latency(ratio, 1.0, ratio, ratio - 0.01, ratio + 0.01, 1, 1, 20, "runtime", "processor")


def test_a_tensor_belongs_to_the_last_layer_that_has_part_in_it(branched: Network) -> None:
    found = {name.split("_")[0] if "conv" not in name else name: layer for name, layer in layers_of(branched.graph.graph).items()}

    assert found["x"] == ""
    assert {found[name] for name in ("batch", "sigmoid", "mul", "pad")} == {"conv2d"}
    assert found["conv2d_1"] == "conv2d_1"
    assert {found[name] for name in ("add", "relu", "mean")} == {"conv2d_2"}
    assert found["linear"] == "linear"


@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_every_layer_has_its_time_in_both_files(
    branched: Network, images: Callable[..., Tensor], tmp_path: Path, source: str
) -> None:
    network = branched
    if source == "onnx":
        float_file(branched, tmp_path).rename(tmp_path / "given.onnx")
        network = load(tmp_path / "given.onnx", pixels="none")
    samples = Samples(images(4, SHAPE))
    layers = {node for node, layer in layers_of(network.graph.graph).items() if node == layer}
    student = quantize(network, samples, plan="deploy", layers={sorted(layers)[1]: {"keep_float": True}})
    artifact = export(student, tmp_path / "out.onnx", samples)

    found = layer_times(network, student, float_file(network, tmp_path), artifact.path, artifact.values)

    assert {one.layer for one in found} - {""} == layers
    assert all(one.ms > 0 and one.float_ms > 0 for one in found if one.layer)
    assert not next(one for one in found if one.layer == sorted(layers)[0]).in_float
    assert found == sorted(found, key=lambda one: one.float_ms - one.ms)


def test_a_layer_says_what_it_costs() -> None:
    assert str(LayerTime("conv2d", 1, 2.5, True)) == "conv2d 2.50 ms (float file 1.00 ms, in float)"
    assert str(LayerTime("", 1, 2, False)) == "what is before the first layer 2.00 ms (float file 1.00 ms)"


@pytest.mark.parametrize("ratio", [0.8, 1.5])
def test_a_run_says_first_that_its_file_is_not_fast(
    monkeypatch: pytest.MonkeyPatch, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: float
) -> None:
    from dreamquant.terminal import print_result

    monkeypatch.setattr(assessing, "timed", lambda *_: latency(ratio))
    few = ["synthesis.count=4", "synthesis.held_out=4"]
    result = run(digits / "digits_bnfolded.onnx", tmp_path / "out.onnx", settings=few, estimate=False)
    print_result(result)
    out = capsys.readouterr().out
    said = " ".join(out.split())

    assert result.assessment.fast == (ratio > 1)
    assert bool(result.assessment.layer_times) == (ratio < 1)
    told = json.loads(json.dumps(result.summary()))
    assert told["fast"] == (ratio > 1)
    assert told["fastest"] is None
    assert any("no faster" in caution for caution in cautions(result, None)[:1]) == (ratio < 1)
    if ratio < 1:
        assert said.startswith("slow no faster than the float file: 0.80 times as fast")
        costly = [one for one in result.assessment.layer_times if one.ms > one.float_ms]
        assert all(str(one) in result.assessment.too_slow() for one in costly[:3])
    else:
        assert said.startswith("file")
        assert result.assessment.too_slow() == ""


class Clock:
    """A time that only knows how many tensors a file quantizes, and which layers that is said to be bad for."""

    def __init__(self, patch: pytest.MonkeyPatch, slow: list[str], ratio: Callable[[int], float]) -> None:
        self.counts: list[int] = []
        self.ratio = ratio
        patch.setattr(MODULE, "timed", self.timed)
        patch.setattr(MODULE, "layer_times", lambda *_: [LayerTime(name, 1.0, 2.0, False) for name in slow])

    def timed(self, network: Network, reference: Path, path: Path) -> Latency:  # noqa: ARG002
        self.counts.append(sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node))
        return latency(self.ratio(self.counts[-1]))


def hasten(network: Network, images: Callable[..., Tensor], **changes: Any) -> tuple[Plan, Any]:
    return hastened(network, Samples(images(4, SHAPE)), load_plan("deploy", **changes), BITS)


def test_layers_that_lose_time_are_left_in_float(
    branched: Network, images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, ["conv2d"], lambda count: 2 - count / 10)
    clock.ratio = lambda count: 1.0 if count == clock.counts[0] else 1.4

    plan, found = hasten(branched, images)

    assert found.float_tensors == tuple(plan.float_tensors)
    assert "conv2d_grid" in plan.float_tensors  # that other layers read its product, which so stays
    assert not [name for name in plan.float_tensors if name.startswith("mul")]
    assert (found.before, found.after, found.tried) == (1.0, 1.4, 1)
    assert "1.00 times as fast as float with all in integers, 1.40 with conv2d_grid" in str(found)
    student = quantize(branched, Samples(images(4, SHAPE)), plan=plan)
    assert not set(plan.float_tensors) & {str(tensor.quantizer.target) for tensor in student.tensors()}


def test_the_fastest_of_what_is_tried_is_kept(
    branched: Network, images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, ["conv2d", "conv2d_1", "conv2d_2"], lambda _: 0.0)
    clock.ratio = lambda _: [0.9, 1.1, 1.3][len(clock.counts) - 1]

    plan, found = hasten(branched, images)

    assert found.after == 1.3
    assert found.tried == 2
    assert clock.counts[1] < clock.counts[2] < clock.counts[0]
    assert plan.float_tensors == list(found.float_tensors)


@pytest.mark.parametrize(("ratio", "later", "tried"), [(1.5, 9.0, 0), (0.9, 0.91, 1), (0.9, 0.7, 1)])
def test_what_is_fast_or_gains_nothing_stays_as_it_is(
    branched: Network, images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, ratio: float, later: float, tried: int
) -> None:
    clock = Clock(monkeypatch, ["conv2d"], lambda _: 0.0)
    clock.ratio = lambda _: ratio if len(clock.counts) == 1 else later

    plan, found = hasten(branched, images)

    assert plan == load_plan("deploy")
    assert (found.after, found.float_tensors, found.tried) == (ratio, (), tried)


def test_the_flow_leaves_in_float_what_is_faster_so(
    monkeypatch: pytest.MonkeyPatch, branched: Network, tmp_path: Path, images: Callable[..., Tensor]
) -> None:
    clock = Clock(monkeypatch, ["conv2d"], lambda _: 0.0)
    clock.ratio = lambda _: 1.0 if len(clock.counts) == 1 else 1.4
    float_file(branched, tmp_path).rename(tmp_path / "given.onnx")
    few = ["synthesis.count=4", "synthesis.held_out=4"]

    result = run(tmp_path / "given.onnx", tmp_path / "out.onnx", settings=few, estimate=False, fastest=True, pixels="none")

    assert result.fastest is not None
    assert "conv2d_grid" in result.fastest.float_tensors
    assert result.student.plan.float_tensors == list(result.fastest.float_tensors)
    assert result.summary()["fastest"]["after"] == 1.4
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert "conv2d_grid" in json.loads(stored["dreamquant.run"])["fastest"]
    assert any("found by timing" in caution for caution in cautions(replace(result, seed=0), None))


def test_files_are_timed_in_batches_that_both_take(branched: Network, images: Callable[..., Tensor], tmp_path: Path) -> None:
    samples = Samples(images(4, SHAPE))
    artifact = export(quantize(branched, samples), tmp_path / "out.onnx", samples)

    assert timed(branched, float_file(branched, tmp_path), artifact.path).batch == 1
