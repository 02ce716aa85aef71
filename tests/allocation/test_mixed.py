"""Mixed precision keeps to its budget, and nothing that does is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.allocation import allocate, sensitivities
from dreamquant.errors import OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.scores import divergence
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples

SHAPE = (2, 7, 6)
PARAMETERS = {"conv2d": 5 * 2 * 9, "conv2d_1": 6 * 5 * 4, "conv_transpose2d": 6 * 4 * 9, "linear": 4 * 5}
MULTIPLICATIONS = {
    "conv2d": PARAMETERS["conv2d"] * 7 * 6,
    "conv2d_1": PARAMETERS["conv2d_1"] * 6 * 5,
    "conv_transpose2d": PARAMETERS["conv_transpose2d"] * 6 * 5,
    "linear": PARAMETERS["linear"],
}


class Small(nn.Module):
    """Four kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 6, 2)
        self.third, self.last = nn.ConvTranspose2d(6, 4, 3, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        scores: Tensor = self.last(x.amax((2, 3)))
        return scores


@pytest.fixture(scope="module")
def small(fill: Callable[..., nn.Module]) -> Network:
    return capture(fill(Small(), SHAPE), SHAPE)


@pytest.fixture(scope="module")
def samples(images: Callable[..., Tensor]) -> Samples:
    return Samples(images(20, SHAPE))


def widths(student: Student, kind: str = "weight") -> dict[str, int]:
    """By the layer that reads it first, the bits of each quantized tensor of a kind."""
    return {next(iter(one.quantizer.users)).name: one.grid.bits for one in student.tensors() if one.kind == kind}


@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
@pytest.mark.parametrize("budget", ["size", "operations"])
@pytest.mark.parametrize("average", [2.0, 3.3, 4.0, 7.9, 8.0])
def test_no_choice_within_the_budget_does_less_damage(
    small: Network, samples: Samples, plan: str, budget: str, average: float
) -> None:
    allocation = allocate(small, samples, plan, bits="W4A8", method="mixed", average=average, budget=budget, choices="2,3,8")
    harm = {}
    for width in (2, 3, 8):
        everywhere = load_plan(plan, layers={name: {"weight_bits": width} for name in PARAMETERS})
        harm[width] = {one.layer: one.weights for one in sensitivities(small, samples, everywhere, "W4A8")}
    inputs = {name: 32 if plan == "zeroq" and name == "conv2d" else 8 for name in PARAMETERS}
    if plan == "zeroq":
        inputs["linear"] = 32  # what comes out of the maximum is no output of an activation function
    count = PARAMETERS if budget == "size" else {name: MULTIPLICATIONS[name] * inputs[name] for name in PARAMETERS}
    best = min(
        sum(harm[width][name] for name, width in zip(count, choice, strict=True))
        for choice in itertools.product((2, 3, 8), repeat=4)
        if sum(count[name] * width for name, width in zip(count, choice, strict=True)) <= average * sum(count.values())
    )
    chosen = {row["layer"]: row["weight_bits"] for row in allocation.layers}
    reached = sum(count[name] * width for name, width in chosen.items()) / sum(count.values())

    assert reached <= average
    assert allocation.totals["average"] == pytest.approx(reached, rel=1e-12)
    assert allocation.totals["damage"] == pytest.approx(best, rel=1e-9)
    assert sum(harm[width][name] for name, width in chosen.items()) == pytest.approx(best, rel=1e-9)
    for row in allocation.layers:
        assert row["count"] == (PARAMETERS if budget == "size" else MULTIPLICATIONS)[row["layer"]]
        assert [row[f"W{width}"] for width in (2, 3, 8)] == [harm[width][row["layer"]] for width in (2, 3, 8)]


def test_the_student_has_the_bits_that_were_chosen(small: Network, samples: Samples) -> None:
    allocation = allocate(small, samples, "deploy", bits="W8A8", method="mixed", average=4.5)
    student = quantize(small, samples, bits="W8A8", plan=allocation.plan)
    chosen = {row["layer"]: row["weight_bits"] for row in allocation.layers}
    expected = small(samples.images)

    assert widths(student) == chosen
    assert len(set(chosen.values())) > 1
    assert allocation.totals["divergence"] == pytest.approx(divergence(expected, student(samples.images)), rel=1e-4)
    same = quantize(small, samples, bits="W4A8", first_weight_bits=4, last_weight_bits=4)
    assert allocation.totals["uniform_bits"] == 4
    assert allocation.totals["uniform_divergence"] == pytest.approx(divergence(expected, same(samples.images)), rel=1e-4)


def test_inputs_get_bits_of_their_own_within_the_same_operations(residual: Network, calibration: Samples) -> None:
    options: dict[str, Any] = {"average": 4.0, "budget": "operations"}
    both = allocate(residual, calibration, "zeroq", bits="W4A8", method="mixed", activations=True, **options)
    weights = allocate(residual, calibration, "zeroq", bits="W4A8", method="mixed", **options)
    student = quantize(residual, calibration, bits="W4A8", plan=both.plan)
    read = widths(student, "activation")
    asked = {row["layer"]: row["input_bits"] for row in both.layers if "input_bits" in row}

    def operations(rows: list[dict[str, Any]], known: dict[str, int]) -> int:
        return sum(row["count"] * row["weight_bits"] * known[row["layer"]] for row in rows)

    # the plan's inputs: the image, and what is pooled before the two layers, are not quantized
    given = {row["layer"]: 8 if row["layer"] in asked else 32 for row in both.layers}
    limit = 4 * sum(row["count"] * given[row["layer"]] for row in both.layers)
    assert asked["conv2d_3"] == asked["conv2d_4"]  # they read one tensor
    assert len(set(asked.values())) > 1
    assert set(asked.items()) >= {(name, bits) for name, bits in read.items() if name in asked}
    assert operations(both.layers, given | asked) <= limit
    assert operations(weights.layers, given) <= limit
    assert both.totals["average"] == pytest.approx(4 * operations(both.layers, given | asked) / limit, rel=1e-12)
    harm = {row["layer"]: row for row in both.layers}
    at_eight = weights.totals["damage"] + sum(harm[name]["A8"] for name in set(asked) - {"conv2d_4"})
    assert both.totals["damage"] <= at_eight


def test_the_frontier_falls_and_holds_what_was_asked(small: Network, samples: Samples) -> None:
    allocation = allocate(small, samples, "zeroq", bits="W4A8", method="mixed", average=4.0)
    frontier = allocation.totals["frontier"]
    damages = [point["damage"] for point in frontier]

    assert [point["asked"] for point in frontier] == [2 + half / 2 for half in range(13)]
    assert all(point["average"] <= point["asked"] for point in frontier)
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[4] > damages[12]
    here = frontier[4]
    assert here["damage"] == allocation.totals["damage"]
    assert here["layers"] == {row["layer"]: {"weight_bits": row["weight_bits"]} for row in allocation.layers}
    assert set(frontier[0]["layers"]) == set(PARAMETERS)


def test_a_weight_used_twice_has_one_width_and_is_stored_once(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.stem(x))))))
            scores: Tensor = self.head(x.mean((2, 3)))
            return scores

    network = capture(fill(Tied(), (3, 6, 5)), (3, 6, 5))
    samples = Samples(images(12, (3, 6, 5)))
    for average in (2.4, 3.0, 5.0):
        allocation = allocate(network, samples, "zeroq", bits="W4A8", method="mixed", average=average)
        chosen = {row["layer"]: row["weight_bits"] for row in allocation.layers}
        total = 162 * chosen["conv2d"] + 324 * chosen["conv2d_1"] + 24 * chosen["linear"]
        assert chosen["conv2d_1"] == chosen["conv2d_2"]
        assert allocation.totals["average"] == pytest.approx(total / 510, rel=1e-12)
        assert total <= 510 * average


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": 1.9}, "mixed.average is 1.9; no average below 2 bits"),
        ({"average": 3.5, "choices": "4,8"}, "no average below 4 bits"),
        ({"average": math.nan}, "mixed.average is nan"),
        ({"average": math.inf}, "mixed.average is inf"),
        ({"average": 0.4, "budget": "operations", "activations": True}, "even the fewest bits"),
        ({"budget": "seconds"}, "unknown mixed.budget 'seconds'"),
        ({"activations": True}, "mixed.activations needs mixed.budget operations"),
        ({"choices": "2,x"}, "mixed.choices is '2,x'"),
        ({"choices": ""}, "mixed.choices is ''"),
        ({"choices": "1,4"}, "mixed.choices is '1,4'"),
        ({"choices": "4,16"}, "from 2 to 8"),
        ({"choice": "4"}, "did you mean 'choices'"),
    ],
)
def test_impossible_options_are_refused(small: Network, samples: Samples, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        allocate(small, samples, bits="W4A8", method="mixed", **options)
    assert "\n" not in str(caught.value)
