"""Distances of answers, and what a person counts, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamquant.network.answers import (
    agreement,
    busy,
    class_logits,
    distance,
    distances,
    loss,
    margins,
    relative_error,
    spread,
    spreads,
)
from dreamquant.network.boxes import overlaps
from dreamquant.network.outputs import STATED, Output


def output(kind: str, shape: tuple[int, ...], form: str = "logits", places: int = 1, **more: object) -> Output:
    return Output("output", kind, STATED, "", 0, shape, form=form, places=places, **more)  # type: ignore[arg-type]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


REGIONS = output("regions", (6, 7), "sigmoid", 2, scores=(4, 5, 6))
EVERY = [
    (output("classes", (5,)), draw(4, 5), draw(4, 5, seed=1)),
    (output("classes", (1,)), draw(4, 1), draw(4, 1, seed=1)),
    (output("classes", (5,), "probabilities"), draw(4, 5).softmax(1), draw(4, 5, seed=1).softmax(1)),
    (output("multilabel", (5,), "sigmoid"), draw(4, 5).sigmoid(), draw(4, 5, seed=1).sigmoid()),
    (output("dense classes", (5, 3, 2)), draw(4, 5, 3, 2), draw(4, 5, 3, 2, seed=1)),
    (output("dense classes", (1, 3, 2), "sigmoid"), draw(4, 1, 3, 2).sigmoid(), draw(4, 1, 3, 2, seed=1).sigmoid()),
    (output("sequence classes", (6, 5), places=2), draw(4, 6, 5), draw(4, 6, 5, seed=1)),
    (output("values", (), ""), draw(4), draw(4, seed=1)),
    (output("classes", (), "sigmoid"), draw(4).sigmoid(), draw(4, seed=1).sigmoid()),
    (output("features", (5,), ""), draw(4, 5), draw(4, 5, seed=1)),
    (output("values", (5,), ""), draw(4, 5), draw(4, 5, seed=1)),
    (REGIONS, draw(4, 6, 7).sigmoid(), draw(4, 6, 7, seed=1).sigmoid()),
]


@pytest.mark.parametrize(("one", "expected", "actual"), EVERY, ids=lambda value: getattr(value, "kind", ""))
def test_nothing_is_apart_from_itself_and_less_apart_is_nearer(one: Output, expected: Tensor, actual: Tensor) -> None:
    variance = spreads([one], [expected])[0]
    far, half, none = (distance(one, expected, expected + share * (actual - expected), variance) for share in (1.0, 0.5, 0.0))

    assert far > half > 0
    assert none == pytest.approx(0.0, abs=1e-9)
    assert agreement(one, expected, expected) == pytest.approx(100.0)
    assert agreement(one, expected, actual) < 100.0
    assert loss(one, expected, actual, variance).item() == pytest.approx(far, rel=1e-3)


@pytest.mark.parametrize(("one", "expected", "actual"), EVERY, ids=lambda value: getattr(value, "kind", ""))
def test_margins_have_a_gradient_and_no_size_of_their_own(one: Output, expected: Tensor, actual: Tensor) -> None:
    value = expected.clone().requires_grad_()
    found = margins(one, value, spreads([one], [expected])[0], 0)
    found.sum().backward()  # type: ignore[no-untyped-call]

    assert len(found) == len(expected)
    assert value.grad is not None
    assert bool(value.grad.isfinite().all())
    assert bool(value.grad.any())


def test_the_unit_of_values_changes_nothing() -> None:
    one = output("values", (5,), "")
    expected, actual = draw(9, 5), draw(9, 5, seed=1)
    for a, b in ((expected, actual), (1000 * expected, 1000 * actual), (expected + 50, actual + 50)):
        assert distance(one, a, b, spread(one, a)) == pytest.approx(
            distance(one, expected, actual, spread(one, expected)), rel=1e-3
        )
        assert relative_error(a, b) == pytest.approx(relative_error(expected, actual), rel=1e-3)


def test_errors_of_values_are_shares_of_what_answers_differ_by() -> None:
    expected = torch.tensor([[100.0], [102.0]])
    assert relative_error(expected, expected + 0.5) == pytest.approx(0.5)
    assert relative_error(expected[:1], expected[:1] + 1) == pytest.approx(0.01)


def test_labels_pixels_and_steps_are_counted_one_by_one() -> None:
    labels = torch.tensor([[0.9, 0.1, 0.6, 0.2]])
    assert agreement(output("multilabel", (4,), "sigmoid"), labels, torch.tensor([[0.8, 0.7, 0.1, 0.3]])) == 50.0
    classes = torch.zeros(1, 3, 2, 2)
    classes[:, 1] = 1
    other = classes.clone()
    other[0, 2, 0, 0] = 5
    assert agreement(output("dense classes", (3, 2, 2)), classes, other) == 75.0
    steps = classes.flatten(2).transpose(1, 2)
    assert agreement(output("sequence classes", (4, 3), places=2), steps, other.flatten(2).transpose(1, 2)) == 75.0


def test_a_ground_says_nothing() -> None:
    masks = torch.tensor([[[[0.1, 0.1], [0.2, 0.9]]], [[[0.8, 0.7], [0.9, 0.6]]]])  # a corner is seen, and nothing but it
    assert busy(output("dense classes", (1, 2, 2), "sigmoid"), masks) == 1 / 8
    steps = torch.eye(3)[torch.tensor([[0, 0, 2, 0], [0, 1, 1, 1]])]
    assert busy(output("sequence classes", (4, 3), places=2), steps) == 1 / 4
    assert busy(output("dense classes", (3, 4)), steps.transpose(1, 2)) == 1 / 4
    assert busy(output("classes", (3,)), torch.zeros(5, 3)) == 1


def test_whole_numbers_are_the_same_or_not() -> None:
    one, expected, actual = output("values", (4,), "numbers"), torch.tensor([[1, 5, 9, 3]]), torch.tensor([[1, 6, 9, 8]])
    assert agreement(one, expected, actual) == 50.0
    assert distance(one, expected, actual, 1.0) == 0.5


def test_the_divergence_of_labels_is_summed() -> None:
    expected, actual = torch.full((1, 2), 0.75), torch.full((1, 2), 0.5)
    wanted = 2 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert distance(output("multilabel", (2,), "sigmoid"), expected, actual, 1.0) == pytest.approx(wanted, rel=1e-5)


def test_yes_and_no_are_two_classes() -> None:
    one = output("classes", (1,), "sigmoid")
    probabilities = torch.tensor([[0.9], [0.2]])
    assert one.classes == 2
    torch.testing.assert_close(class_logits(one, probabilities).softmax(1)[:, 1:], probabilities)


def test_maps_of_one_pixel_are_classes() -> None:
    one = output("classes", (5, 1, 1))
    assert class_logits(one, torch.zeros(3, 5, 1, 1)).shape == (3, 5)


def test_all_outputs_count_but_those_that_know_of_no_image() -> None:
    (one, expected, actual), (other, b, c) = EVERY[0], EVERY[10]
    constant = Output("priors", "values", "graph", "", None, (5,))
    both = distances([one, other, constant], [expected, b, b], [actual, c, c])
    assert both == pytest.approx(distances([one], [expected], [actual]) + distances([other], [b], [c]))


# ---- boxes


def rows(*found: tuple[float, ...]) -> Tensor:
    """One image's rows: x, y, width, height, scores of three classes."""
    return torch.tensor([found])


SURE, OTHER = (10.0, 10.0, 8.0, 8.0, 0.9, 0.0, 0.0), (30.0, 30.0, 8.0, 8.0, 0.0, 0.8, 0.0)
EMPTY = (50.0, 50.0, 8.0, 8.0, 0.01, 0.0, 0.0)


@pytest.mark.parametrize(
    ("actual", "f1"),
    [
        ((SURE, OTHER, EMPTY), 100.0),
        (((11.0, *SURE[1:]), OTHER, EMPTY), 100.0),  # nearly the same box
        (((16.0, *SURE[1:]), OTHER, EMPTY), 50.0),
        (((*SURE[:4], 0.0, 0.9, 0.0), OTHER, EMPTY), 50.0),  # of another class
        ((EMPTY, OTHER, EMPTY), 100 * 2 / 3),
        ((EMPTY, EMPTY, EMPTY), 0.0),
        ((SURE, OTHER, SURE), 100.0),  # twice the same is one
    ],
)
def test_boxes_are_matched_by_place_and_class(actual: tuple[tuple[float, ...], ...], f1: float) -> None:
    one = output("regions", (3, 7), "sigmoid", 2, scores=(4, 5, 6))
    expected = rows(SURE, OTHER, EMPTY)
    assert agreement(one, expected, rows(*actual)) == pytest.approx(f1)
    turned = output("regions", (7, 3), "sigmoid", 1, scores=(4, 5, 6))
    assert agreement(turned, expected.transpose(1, 2), rows(*actual).transpose(1, 2)) == pytest.approx(f1)


def test_an_objectness_weighs_classes() -> None:
    one = output("regions", (2, 7), "sigmoid", 2, scores=(4, 5, 6), objectness=True)
    seen, unseen = (10.0, 10.0, 8.0, 8.0, 0.9, 0.9, 0.1), (30.0, 30.0, 8.0, 8.0, 0.01, 0.9, 0.1)
    moved = (45.0, 45.0, *unseen[2:])
    assert agreement(one, rows(seen, unseen), rows(seen, moved)) == 100.0


def test_overlaps_are_intersections_over_unions() -> None:
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    other = torch.tensor([[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(overlaps(box, other), torch.tensor([[1 / 3, 0.0]]))
