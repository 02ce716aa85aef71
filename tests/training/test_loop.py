"""The loop: what learns when, what stops it, and what it ends with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.notes import notes
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training import train
from dreamquant.training._loop import Phase, Schedule, split, train_student
from dreamquant.training._losses import Decoupled
from dreamquant.training._sources import FixedSet

SCHEDULE = Schedule(
    epochs=4,
    iterations=2,
    warm_up=1,
    range_epochs=1,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=1e-4,
    milestones="",
    clip=0.0,
    patience=0,
)


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W3A4", plan="zeroq")


def run(
    network: Network,
    student: Student,
    samples: Samples,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, int, float], None] | None = None,
    folder: Path | None = None,
    **changes: Any,
) -> Student:
    generator = torch.Generator().manual_seed(0)
    schedule = replace(SCHEDULE, **changes)
    source = FixedSet(network, samples, generator, batch=8, crop=0.0)
    return train_student(
        network,
        student,
        samples.images,
        [Phase(schedule.epochs, source)],
        loss or Decoupled(1.0, 8.0, 1.0),
        schedule,
        generator=generator,
        callback=callback,
        folder=folder,
    )


def weights(student: Student) -> list[Tensor]:
    return [tensor_of(student.network.graph, tensor.node) for tensor in student.tensors() if tensor.kind == "weight"]


def scales(student: Student) -> list[Tensor]:
    return [tensor.grid.scale for tensor in student.tensors() if tensor.kind == "activation"]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_in_the_warm_up_only_ranges_move_and_then_only_weights(residual: Network, student: Student, calibration: Samples) -> None:
    on_grid = run(residual, student, calibration, epochs=1, warm_up=1, range_epochs=0)
    warm = run(residual, student, calibration, epochs=1, warm_up=1, range_epochs=1)
    assert same(weights(on_grid), weights(warm))
    assert same(scales(on_grid), scales(student))
    assert not any(torch.equal(one, other) for one, other in zip(scales(warm), scales(student), strict=True))

    trained = run(residual, student, calibration, epochs=3, warm_up=1, range_epochs=1)
    assert not any(torch.equal(one, other) for one, other in zip(weights(trained), weights(warm), strict=True))
    assert same(scales(trained), scales(warm))


def nan_after(steps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The usual loss, but not a number after so many steps."""
    count: Iterator[int] = iter(range(10**6))
    usual = Decoupled(1.0, 8.0, 1.0)
    return lambda *parts: usual(*parts) * (math.nan if next(count) >= steps else 1.0)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_loss_that_is_no_number_ends_with_the_last_good_epoch(
    residual: Network, student: Student, calibration: Samples, caplog: pytest.LogCaptureFixture, epochs: int
) -> None:
    steps: list[int] = []
    loss = nan_after(2 * epochs + 1)
    found = run(residual, student, calibration, loss, callback=lambda *words: steps.append(words[0]))
    good = run(residual, student, calibration, epochs=epochs)

    assert same(weights(found), weights(good))
    assert same(scales(found), scales(good))
    assert steps == list(range(1, 2 * epochs + 2))
    assert f"the loss became nan in epoch {epochs + 1}; the student is as it was before that epoch" in caplog.text


def test_a_weight_that_is_no_number_is_noticed_at_the_very_end(
    residual: Network, student: Student, calibration: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    def infinite_gradient(scores: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return 1 + (scores.sum() - scores.sum().detach()).abs().sqrt()  # finite, its gradient is not

    found = run(residual, student, calibration, infinite_gradient, epochs=2, iterations=1)
    assert same(weights(found), weights(run(residual, student, calibration, epochs=1, iterations=1)))
    assert "a weight was no longer finite in epoch 2" in caplog.text


def test_a_rate_that_diverges_leaves_a_student_that_works(
    residual: Network, student: Student, calibration: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(residual, student, calibration, learning_rate=1e12)
    assert found(calibration.images).isfinite().all()
    assert "training ends" in caplog.text
    kept = run(residual, student, calibration, learning_rate=1e12, clip=1e-12)
    assert kept(calibration.images).isfinite().all()


def test_a_generator_that_diverges_is_noticed(
    residual: Network, student: Student, calibration: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"epochs": 3, "iterations": 3, "batch": 4, "width": 4, "warm_up": 2, "range_epochs": 1}
    found = train(residual, student, calibration, method="gdfq", statistics_weight=float("nan"), **small)
    assert "the generator's loss became nan in epoch 1" in caplog.text
    assert same(scales(found), scales(student))


def test_clipping_bounds_the_step(residual: Network, student: Student, calibration: Samples) -> None:
    def moved(clip: float) -> float:
        found = run(
            residual, student, calibration, epochs=1, iterations=1, warm_up=0, range_epochs=0, clip=clip, weight_decay=0.0
        )
        names = {str(node.target) for node in found.network.graph.graph.nodes if notes(node).changed} - {
            str(tensor.node.target) for tensor in found.tensors()
        }  # what stands on no grid
        pairs = [(found.network.graph.get_buffer(name), student.network.graph.get_buffer(name)) for name in names]
        return sum((one - other).square().sum().item() for one, other in pairs) ** 0.5

    bound = 1e-3 * (1 + 0.9) * 0.5  # the first step of Nesterov's momentum is (1 + momentum) rate
    assert 0 < moved(0.5) <= 1.01 * bound
    assert moved(0.0) > 3 * moved(0.5)


def test_rates_fall_at_the_milestones() -> None:
    schedule = replace(SCHEDULE, milestones="2, 5")
    assert [round(schedule.factor(epoch), 6) for epoch in range(7)] == [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert SCHEDULE.factor(1000) == 1


def test_a_milestone_slows_what_follows(residual: Network, student: Student, calibration: Samples) -> None:
    start = run(residual, student, calibration, epochs=1)

    def moved(**changes: Any) -> float:
        found = run(residual, student, calibration, epochs=2, **changes)
        return sum((one - other).abs().sum().item() for one, other in zip(weights(found), weights(start), strict=True))

    assert moved(milestones="1") < 0.5 * moved()


@pytest.mark.parametrize("resumed", [False, True])
def test_patience_ends_training_with_the_state_it_has_then(
    residual: Network, student: Student, calibration: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed: bool
) -> None:
    told = iter([50.0, 70.0, 60.0, 70.0, 99.0])
    monkeypatch.setattr("dreamquant.training._loop.top1_agreement", lambda *_: next(told))
    steps: list[int] = []

    def stop(done: int, total: int, loss: float) -> None:
        steps.append(done)
        if resumed and done == 8 and steps.count(8) == 1:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"epochs": 9, "patience": 2, "folder": tmp_path, "callback": stop}
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            run(residual, student, calibration, **settings)
    found = run(residual, student, calibration, **settings)
    # the warm-up is not compared; epochs 2 to 5 are, and the last two of them bring nothing new
    assert max(steps) == 10
    assert same(weights(found), weights(run(residual, student, calibration, epochs=5)))
    steps.clear()
    again = run(residual, student, calibration, **settings)
    assert not steps
    assert same(weights(again), weights(found))


def test_images_for_the_stopping_rule_are_not_trained_on(calibration: Samples) -> None:
    samples = replace(calibration, labels=torch.arange(len(calibration)))
    kept, held_out = split(samples, replace(SCHEDULE, patience=3), torch.Generator().manual_seed(0))
    assert (len(kept), len(held_out)) == (35, 5)
    assert kept.labels is not None
    assert torch.equal(samples.images[kept.labels], kept.images)
    assert {tuple(row.tolist()) for row in torch.cat([kept.images, held_out]).flatten(1)} == {
        tuple(row.tolist()) for row in samples.images.flatten(1)
    }
    assert split(samples, SCHEDULE, torch.Generator())[0] is samples
    with pytest.raises(OptionError, match="patience needs at least two images"):
        split(Samples(samples.images[:1]), replace(SCHEDULE, patience=3), torch.Generator())


def test_a_fixed_set_gives_its_labels_or_the_teachers(residual: Network, calibration: Samples) -> None:
    labels = torch.arange(len(calibration)) % 5
    for given, expected in ((labels, labels), (None, residual(calibration.images).argmax(1))):
        generator = torch.Generator().manual_seed(0)
        batch = FixedSet(residual, replace(calibration, labels=given), generator, batch=100, crop=0.0)()
        order = [int((calibration.images == image).flatten(1).all(1).nonzero()) for image in batch.images]
        assert sorted(order) == list(range(len(calibration)))
        assert torch.equal(batch.labels, expected[order])
        torch.testing.assert_close(batch.teacher, residual(batch.images))
    cropped = FixedSet(residual, calibration, torch.Generator().manual_seed(0), batch=100, crop=0.5)()
    assert not any((calibration.images == image).flatten(1).all(1).any() for image in cropped.images)
    torch.testing.assert_close(cropped.teacher, residual(cropped.images))
