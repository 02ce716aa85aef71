"""The worst layers get more bits until the student agrees with its network, and no more layers than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.allocation import allocate, sensitivities
from dreamquant.allocation.auto import _enough
from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.scores import divergence
from dreamquant.quantization.plan import Plan, load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples, halves
from dreamquant.synthesis import synthesize

SHAPE = (3, 6, 5)
OPTIONS = {"weight_granularity": "tensor"}


@pytest.fixture(scope="module")
def fragile(fill: Callable[..., nn.Module]) -> Network:
    """Six layers with near decisions; single weights far from all others make one scale of few bits ruin two of them."""
    layers = [part for i in range(5) for part in (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(240, 6), nn.BatchNorm1d(6, affine=False))
    with torch.no_grad():
        fill(module, SHAPE)
        for place, size in ((4, 4.0), (6, 8.0)):
            module[place].weight[0, 0, 1, 1] = size  # type: ignore[index, operator]
        module.train()
        module(torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(3)))
    return load(module.eval(), input_shape=SHAPE, outputs={"output": "classes"})


@pytest.fixture(scope="module")
def samples(images: Callable[..., Tensor]) -> Samples:
    return Samples(images(80, SHAPE, seed=5))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("zeroq", **OPTIONS)


def measured(network: Network, samples: Samples, plan: Plan, bits: str) -> tuple[float, float]:
    """Agreement in percent and divergence in nats on every second image, of a student calibrated on the others."""
    student = quantize(network, Samples(samples.images[::2]), bits=bits, plan=plan)
    held_out = samples.images[1::2]
    expected, actual = network(held_out), student(held_out)
    return 100 * (expected.argmax(1) == actual.argmax(1)).double().mean().item(), divergence(expected, actual)


def test_the_worst_layers_are_raised_and_agreement_is_reached(fragile: Network, samples: Samples, plan: Plan) -> None:
    allocation = allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=90.0)
    totals, raised = allocation.totals, [row for row in allocation.layers if row["decision"] == "8 bits"]
    before, after = measured(fragile, samples, plan, "W4A8"), measured(fragile, samples, allocation.plan, "W4A8")

    assert before[0] == pytest.approx(totals["agreement_before"])
    assert after[0] == pytest.approx(totals["agreement_after"])
    assert before[1] == pytest.approx(totals["divergence_before"], rel=1e-4)
    assert after[1] == pytest.approx(totals["divergence_after"], rel=1e-4)
    assert before[0] < 90 <= after[0]
    assert 0 < totals["raised"] == len(raised) < totals["layers"] == 6
    assert (totals["held_out"], totals["procedural"]) == (40, 0)
    assert totals["agreement_low"] < totals["agreement_after"] < totals["agreement_high"]
    rest = [row["damage"] for row in allocation.layers if row["decision"] == "as the plan"]
    assert min(row["damage"] for row in raised) >= max(rest)
    fewer = load_plan(
        "zeroq",
        **OPTIONS,
        layers={
            one: allocation.plan.layers[one]
            for one in [row["layer"] for row in sorted(raised, key=lambda row: -row["damage"])[:-1]]
        },
    )
    assert measured(fragile, samples, fewer, "W4A8")[0] < 90  # one layer less would not do


def test_damage_is_that_of_weights_and_input_on_the_calibrating_half(fragile: Network, samples: Samples, plan: Plan) -> None:
    allocation = allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=0.0)
    found = {one.layer: one.both for one in sensitivities(fragile, Samples(samples.images[::2]), plan, "W4A8")}

    assert {row["layer"]: row["damage"] for row in allocation.layers} == found
    assert list(found) == [row["layer"] for row in allocation.layers]


def test_what_agrees_already_is_left_as_it_is(fragile: Network, samples: Samples, plan: Plan) -> None:
    allocation = allocate(fragile, samples, plan, bits="W8A8", method="auto", agreement=50.0)

    assert allocation.plan == plan
    assert allocation.totals["raised"] == 0
    assert {row["decision"] for row in allocation.layers} == {"as the plan"}


def test_what_eight_bits_do_not_reach_is_left_float(fragile: Network, samples: Samples, plan: Plan) -> None:
    goal = 0.5 * measured(fragile, samples, load_plan("zeroq", **OPTIONS), "W8A8")[1]
    allocation = allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=0.0, kl=goal)
    decisions = [row["decision"] for row in allocation.layers]

    assert set(decisions) == {"8 bits", "float"}
    assert 0 < decisions.count("float") < 6
    assert {layer.input_bits for layer in allocation.plan.layers.values()} == {8}
    assert measured(fragile, samples, allocation.plan, "W4A8")[1] <= goal * (1 + 1e-4)
    student = quantize(fragile, samples, bits="W4A8", plan=allocation.plan)
    assert student.float_layers() == [row["layer"] for row in allocation.layers if row["decision"] == "float"]


def test_no_more_layers_are_raised_than_may_be(fragile: Network, samples: Samples, plan: Plan) -> None:
    free = allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=90.0)
    enough = free.totals["raised"]
    bound = allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=90.0, most=enough)

    assert bound.plan == free.plan
    with pytest.raises(OptionError, match=r"cannot reach agreement 100 with kl 1e-09: with conv2d_\d left float it comes to"):
        allocate(fragile, samples, plan, bits="W4A8", method="auto", agreement=100.0, kl=1e-9, most=1)


def test_what_cannot_be_reached_says_what_was(residual: Network, calibration: Samples) -> None:
    """Sums between layers stay on two bits even where every layer is float."""
    with pytest.raises(OptionError, match="auto cannot reach agreement 90 with kl 1e-06") as caught:
        allocate(residual, calibration, "zeroq", bits="W2A2", method="auto", agreement=90.0, kl=1e-6)
    assert "and 1 more left float it comes to agreement" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_is_left_float_is_no_answer(fragile: Network, samples: Samples, plan: Plan) -> None:
    with pytest.raises(OptionError, match=r"only with every layer left float, .*one layer less in float it comes to agreement"):
        allocate(fragile, samples, plan, bits="W2A2", method="auto", agreement=0.0, kl=1e-9)


def test_a_single_sample_is_calibrated_and_measured_on(fragile: Network, samples: Samples, plan: Plan) -> None:
    one = Samples(samples.images[:1])
    totals = allocate(fragile, one, plan, bits="W8A8", method="auto", agreement=100.0, kl=1.0).totals

    assert totals["held_out"] == 1
    assert totals["agreement_after"] == 100.0


@pytest.fixture(scope="module")
def made() -> dict[tuple[int, int], Samples]:
    """Procedural images by their count and seed."""
    return {}


@pytest.mark.parametrize(("asked", "needed"), [(50.0, 20), (95.0, 40), (99.0, 200), (99.9, 400), (100.0, 400)])
def test_so_many_images_that_the_agreement_can_be_told(
    digits: Path, asked: float, needed: int, made: dict[tuple[int, int], Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(network: Network, count: int, *, method: str, seed: int) -> Samples:
        if (count, seed) not in made:
            made[count, seed] = synthesize(network, count, method=method, seed=seed)
        return made[count, seed]

    network = load(digits / "digits_bnfolded.onnx")
    samples = synthesize(network, 40, method="fractal", seed=0)
    if asked > 95:  # thousands; that the same seed gives the same is seen on fewer
        monkeypatch.setattr("dreamquant.allocation.auto.synthesize", once)
    found = allocate(network, samples, method="auto", agreement=asked).totals if asked in (95.0, 99.0) else None
    images = _enough(network, halves(samples)[1], asked)

    assert len(images) == needed
    assert torch.equal(images.images[:20], samples.images[1::2])
    assert found is None or (found["held_out"], found["procedural"]) == (needed, needed - 20)
    assert found is None or found["agreement_after"] >= asked
    more = images.images[20:]
    assert len(more.unique(dim=0)) == len(more)
    sure = [network(part).softmax(1).amax(1).mean() for part in (samples.images, more) if len(part)]
    assert len(sure) == 1 or sure[0] < sure[1]  # those that the network is surest of
    assert torch.equal(_enough(network, halves(samples)[1], asked).images, images.images)


def test_no_images_are_added_for_other_answers_or_an_unknown_input(network_of_values: Network, samples: Samples) -> None:
    assert len(_enough(network_of_values, samples, 99.9)) == len(samples)


@pytest.fixture(scope="module")
def network_of_values(fill: Callable[..., nn.Module]) -> Network:
    module = fill(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(24, 3)), SHAPE)
    return load(module.eval(), input_shape=SHAPE, pixels="none", outputs={"output": "values"})


@pytest.mark.parametrize(
    "options", [{"agreement": 101.0}, {"agreement": -1.0}, {"agreement": float("nan")}, {"kl": -0.1}, {"most": -1}]
)
def test_impossible_options_are_refused(fragile: Network, samples: Samples, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="auto asks for agreement"):
        allocate(fragile, samples, "zeroq", method="auto", **options)
