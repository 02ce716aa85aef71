"""Hybrid granularity: one scale where that costs nothing, and never a student worse than with all scales."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from dreamquant.allocation import Allocation, allocate
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.scores import divergence
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples

CASES = [("deploy", "W4A8"), ("deploy", "W6A8"), ("zeroq", "W8A8"), ("zeroq", "W3A8"), ("brecq", "W4A4")]


def whole(network: Network, samples: Samples, plan: str, bits: str, **layers: str) -> float:
    """The divergence of the student whose layers have these granularities."""
    student = quantize(
        network, samples, bits=bits, plan=plan, layers={name: {"granularity": kind} for name, kind in layers.items()}
    )
    return divergence(network(samples.images), student(samples.images))


def choices(allocation: Allocation) -> dict[str, str]:
    return {row["layer"]: row["choice"] for row in allocation.layers}


@pytest.mark.parametrize(("plan", "bits"), CASES)
def test_in_accuracy_mode_nothing_is_worse_than_all_per_channel(
    residual: Network, calibration: Samples, plan: str, bits: str
) -> None:
    allocation = allocate(residual, calibration, plan, bits=bits, method="hybrid")
    rows, totals, chosen = allocation.layers, allocation.totals, choices(allocation)
    every = dict.fromkeys(chosen, "channel")

    assert whole(residual, calibration, plan, bits, **chosen) == pytest.approx(totals["hybrid"], rel=1e-4)
    assert whole(residual, calibration, plan, bits, **every) == pytest.approx(totals["all_channel"], rel=1e-4)
    assert whole(residual, calibration, plan, bits, **dict.fromkeys(chosen, "tensor")) == pytest.approx(
        totals["all_tensor"], rel=1e-4
    )
    assert totals["hybrid"] <= totals["all_channel"]
    assert totals["channel_layers"] == list(chosen.values()).count("channel") >= totals["channel_layers_by_gap"]
    assert totals["layers"] == len(rows) == 9
    for row in rows:
        if row["tensor"] > row["channel"]:
            assert row["choice"] == "channel"
    if totals["channel_layers"] == totals["channel_layers_by_gap"]:
        assert sum(row[row["choice"]] for row in rows) == sum(min(row["tensor"], row["channel"]) for row in rows)


def test_the_plan_says_what_the_rows_say(residual: Network, calibration: Samples) -> None:
    allocation = allocate(residual, calibration, "zeroq", bits="W8A8", method="hybrid")
    student = quantize(residual, calibration, bits="W8A8", plan=allocation.plan)
    scales = {next(iter(t.quantizer.users)).name: t.grid.scale.numel() for t in student.tensors() if t.kind == "weight"}

    assert {name: "tensor" if count == 1 else "channel" for name, count in scales.items()} == choices(allocation)
    assert 0 < allocation.totals["channel_layers"] < 9


SHAPE = (3, 6, 5)


@pytest.fixture(scope="module")
def uneven(fill: Callable[..., nn.Module]) -> Network:
    """Four layers whose channels all reach from -1 to 1 times a scale, one for all but in the third."""
    module = fill(
        nn.Sequential(
            *(part for i in range(3) for part in (nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1), nn.ReLU())),
            nn.Flatten(),
            nn.Linear(180, 5),
        ),
        SHAPE,
    )
    with torch.no_grad():
        for layer in (module[0], module[2], module[4], module[7]):  # type: ignore[index]
            rows = layer.weight.flatten(1)
            low, high = rows.aminmax(dim=1, keepdim=True)
            rows = 0.2 * (2 * (rows - low) / (high - low) - 1).clamp(-1, 1)
            layer.weight.copy_(rows.view_as(layer.weight))
        module[4].weight.mul_(torch.tensor([1e-2, 0.02, 1.0, 0.05, 2.0, 0.1]).view(-1, 1, 1, 1))  # type: ignore[index, union-attr, operator]
        module[7].weight.mul_(0.3)  # type: ignore[index, union-attr, operator]
    return capture(module, SHAPE)


@pytest.fixture(scope="module")
def samples(images: Callable[..., Tensor]) -> Samples:
    return Samples(images(24, SHAPE))


@pytest.mark.parametrize("mode", ["accuracy", "latency", "threshold"])
def test_only_the_layer_with_uneven_channels_keeps_its_scales(uneven: Network, samples: Samples, mode: str) -> None:
    allocation = allocate(uneven, samples, "zeroq", bits="W4A8", method="hybrid", mode=mode)

    assert choices(allocation) == {"conv2d": "tensor", "conv2d_1": "tensor", "conv2d_2": "channel", "linear": "tensor"}
    assert allocation.totals["hybrid"] == pytest.approx(allocation.totals["all_channel"], rel=1e-4)
    assert allocation.totals["all_tensor"] > 1.2 * allocation.totals["all_channel"]


def test_where_single_layers_deceive_layers_join_until_the_whole_is_no_worse(
    uneven: Network, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deceived(*arguments: object) -> list[float]:
        return [0.0, 0.1, 0.2, 0.3, *[1.0] * 4]  # per tensor, then per channel

    monkeypatch.setattr(import_module("dreamquant.allocation.hybrid"), "damages", deceived)
    allocation = allocate(uneven, samples, "zeroq", bits="W4A8", method="hybrid")

    assert allocation.totals["channel_layers_by_gap"] == 0
    assert choices(allocation) == {"conv2d": "tensor", "conv2d_1": "tensor", "conv2d_2": "channel", "linear": "channel"}
    assert allocation.totals["hybrid"] <= allocation.totals["all_channel"] < allocation.totals["all_tensor"]


@pytest.mark.parametrize(("threshold", "count"), [(-1.0, 9), (0.0, 6), (1.0, 0)])
def test_a_threshold_decides_by_itself(residual: Network, calibration: Samples, threshold: float, count: int) -> None:
    allocation = allocate(residual, calibration, "zeroq", bits="W4A8", method="hybrid", mode="threshold", threshold=threshold)

    assert allocation.totals["channel_layers"] == count
    for row in allocation.layers:
        assert row["choice"] == ("tensor" if row["tensor"] - row["channel"] <= threshold else "channel")


@pytest.mark.parametrize(("plan", "bits"), CASES)
def test_latency_mode_keeps_within_its_tolerance_with_few_layers(
    residual: Network, calibration: Samples, plan: str, bits: str
) -> None:
    exact, tight, loose = (
        allocate(residual, calibration, plan, bits=bits, method="hybrid", mode="latency", tolerance=tolerance)
        for tolerance in (0.0, 0.05, 1e6)
    )
    for allocation, tolerance in ((exact, 0.0), (tight, 0.05)):
        assert allocation.totals["hybrid"] <= (1 + tolerance) * allocation.totals["all_channel"]
        assert whole(residual, calibration, plan, bits, **choices(allocation)) == pytest.approx(
            allocation.totals["hybrid"], rel=1e-4
        )
    assert loose.totals["channel_layers"] == 0
    accurate = allocate(residual, calibration, plan, bits=bits, method="hybrid").totals
    if accurate["channel_layers"] == accurate["channel_layers_by_gap"]:
        assert tight.totals["channel_layers"] <= accurate["channel_layers"]


def test_what_a_layer_had_of_its_own_stays(residual: Network, calibration: Samples) -> None:
    plan = load_plan("zeroq", layers={"linear": {"weight_bits": 8}, "conv2d": {"keep_float": True}})
    changed = allocate(residual, calibration, plan, bits="W4A8", method="hybrid").plan

    assert changed.layer("linear").weight_bits == 8
    assert changed.layer("linear").granularity is not None
    assert changed.layer("conv2d") == plan.layer("conv2d")
