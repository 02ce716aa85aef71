"""The loop that dreams are made in: schedules, groups, stops and refusals, and the terms that objectives are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import DreamQuantError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels
from dreamquant.network.load import load
from dreamquant.network.statistics import EPSILON, BatchNormStatistics
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._loop import (
    Group,
    Schedule,
    batches,
    class_count,
    cosine,
    decay,
    input_distance,
    optimize,
    optimize_images,
    plateau,
    spread_labels,
    total_variation,
    variance_distance,
)
from dreamquant.synthesis._procedural import first_images

constant = decay(lambda _: 1.0)


def rates(schedule: Callable[[torch.optim.Optimizer], Schedule], losses: list[float]) -> list[float]:
    """The learning rate of each step, from 1, where the steps have these losses."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    changing, found = schedule(optimizer), []
    for loss in losses:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        changing.step(loss)
    return found


def parabola(start: float = 1.0) -> tuple[Tensor, Callable[[], Tensor]]:
    x = torch.full((1,), start, requires_grad=True)
    return x, lambda: x.square().sum()


class TestSchedules:
    def test_plateau_divides_by_ten_where_nothing_is_gained(self) -> None:
        found = rates(plateau(3), [1.0] * 30)

        assert found[:4] == [1.0] * 4
        assert sorted(set(found), reverse=True) == pytest.approx([1, 0.1, 0.01, 1e-3, 1e-4])  # and no smaller
        assert rates(plateau(3), [1.0 / (step + 1) for step in range(30)]) == [1.0] * 30

    def test_cosine_rises_over_the_first_steps_and_ends_near_nothing(self) -> None:
        found = rates(cosine(40), [1.0] * 40)

        assert found[0] == pytest.approx(1 / 3)
        assert found[:3] == sorted(found[:3])
        assert found[2] == max(found) > 0.95
        assert found[2:] == sorted(found[2:], reverse=True)
        assert 0 < found[-1] < 0.01

    def test_decay_does_not_look_at_the_loss(self) -> None:
        assert rates(decay(lambda step: 0.5**step), [1.0, 9.0, math.pi, 0.0]) == [1, 0.5, 0.25, 0.125]

    def test_an_unknown_one_is_answered_with_the_known(self) -> None:
        x, loss = parabola()
        with pytest.raises(OptionError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
            optimize_images(x, loss, steps=1, learning_rate=0.1, patience=1, schedule="cosin")


class TestOptimize:
    def test_the_loss_of_each_step_is_returned_and_told(self) -> None:
        x, loss = parabola()
        told: list[tuple[int, int, float]] = []
        losses = optimize([Group([x], 0.1, constant)], loss, steps=20, callback=lambda *step: told.append(step))

        assert losses[0] == 1.0
        assert losses[-1] < 0.1
        assert told == [(step + 1, 20, value) for step, value in enumerate(losses)]

    def test_each_group_has_its_own_rate_and_schedule(self) -> None:
        slow, fast, falling = (torch.zeros(1, requires_grad=True) for _ in range(3))
        groups = [Group([slow], 1e-3, constant), Group([fast], 0.1, constant), Group([falling], 0.1, decay(lambda s: 0.5**s))]
        optimize(groups, lambda: -(slow + fast + falling).sum(), steps=5)

        # the gradient is -1 throughout, so Adam moves by the learning rate
        assert slow.item() == pytest.approx(5e-3, rel=1e-3)
        assert fast.item() == pytest.approx(0.5, rel=1e-3)
        assert falling.item() == pytest.approx(0.1 * (2 - 0.5**4), rel=1e-3)

    def test_the_images_schedule_changes_the_steps(self) -> None:
        ends = {}
        for schedule in ("plateau", "cosine"):
            x, _ = parabola(0.0)
            optimize_images(x, lambda x=x: -x.sum(), steps=20, learning_rate=0.1, patience=100, schedule=schedule)  # type: ignore[misc]
            ends[schedule] = x.item()

        assert ends["plateau"] == pytest.approx(2.0, rel=1e-3)
        assert 0.4 * ends["plateau"] < ends["cosine"] < 0.6 * ends["plateau"]

    def test_it_stops_where_the_best_loss_settles(self) -> None:
        settled = torch.zeros(1, requires_grad=True)
        groups = [Group([settled], 0.1, constant)]

        assert len(optimize(groups, lambda: settled.sum() * 0 + 1, steps=50, tolerance=0.01, window=5)) == 6
        assert len(optimize(groups, lambda: settled.sum() * 0 + 1, steps=50, window=5)) == 50
        assert len(optimize(groups, lambda: settled.sum() - 1, steps=50, tolerance=0.01, window=5)) == 50

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_ends_it(self, value: float) -> None:
        x, loss = parabola()
        steps: list[int] = []

        def breaks() -> Tensor:
            steps.append(1)
            return loss() * (value if len(steps) == 3 else 1.0)

        with pytest.raises(DreamQuantError, match=f"the synthesis loss became {value} at step 3"):
            optimize([Group([x], 0.1, constant)], breaks, steps=9)

    @pytest.mark.parametrize("steps", [0, -1])
    def test_no_steps_are_refused(self, steps: int) -> None:
        x, loss = parabola()
        with pytest.raises(OptionError, match=f"steps is {steps}; at least one step"):
            optimize([Group([x], 0.1, constant)], loss, steps=steps)

    @pytest.mark.parametrize("rate", [0.0, -0.1, math.inf, math.nan])
    def test_an_impossible_learning_rate_is_refused_whichever_group_has_it(self, rate: float) -> None:
        x, loss = parabola()
        with pytest.raises(OptionError, match=f"learning_rate is {rate}; it must be above 0 and finite"):
            optimize([Group([x], 0.1, constant), Group([x], rate, constant)], loss, steps=1)

    @pytest.mark.parametrize("schedule", ["plateau", "cosine"])
    @pytest.mark.parametrize("patience", [0, -1])
    def test_no_patience_is_refused(self, schedule: str, patience: int) -> None:
        x, loss = parabola()
        with pytest.raises(OptionError, match=f"patience is {patience}; at least one step"):
            optimize_images(x, loss, steps=3, learning_rate=0.1, patience=patience, schedule=schedule, tolerance=0.1)


class TestBatches:
    @pytest.mark.parametrize(
        ("count", "size", "sizes"), [(5, 8, [5]), (8, 8, [8]), (9, 8, [4, 5]), (10, 4, [3, 3, 4]), (3, 1, [1, 1, 1])]
    )
    def test_sizes_are_nearly_equal_and_cover_everything(self, count: int, size: int, sizes: list[int]) -> None:
        slices = [piece for piece, _ in batches(count, size, None)]

        assert [piece.stop - piece.start for piece in slices] == sizes
        assert [index for piece in slices for index in range(count)[piece]] == list(range(count))

    def test_progress_counts_on(self) -> None:
        told: list[tuple[int, int, float]] = []
        for _, callback in batches(5, 2, lambda *step: told.append(step)):
            assert callback is not None
            for step in range(4):
                callback(step + 1, 4, 0.5)

        assert told == [(step + 1, 12, 0.5) for step in range(12)]
        assert [callback for _, callback in batches(5, 2, None)] == [None] * 3

    def test_batches_of_nothing_are_refused(self) -> None:
        with pytest.raises(OptionError, match="batch is 0; at least one image"):
            list(batches(5, 0, None))


class TestTerms:
    def test_total_variation_of_constant_images_is_nothing_with_a_finite_gradient(self) -> None:
        images = torch.full((2, 3, 5, 4), 0.7, requires_grad=True)
        found = total_variation(images)
        found.backward()  # type: ignore[no-untyped-call]

        assert found.item() == 0
        assert images.grad is not None
        assert bool(images.grad.isfinite().all())

    def test_total_variation_is_the_norms_of_four_differences(self) -> None:
        image = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).view(1, 1, 2, 2)
        along, down, diagonal, other = math.hypot(1, 2), math.hypot(2, 3), 4.0, 1.0

        assert total_variation(image).item() == pytest.approx(along + down + diagonal + other)
        assert total_variation(image.repeat(4, 1, 1, 1)).item() == pytest.approx(2 * total_variation(image).item())

    def test_variance_distance_is_nothing_where_statistics_match(self, images: Callable[..., Tensor]) -> None:
        feature = images(6, (3, 5, 4)) * 2 + 1
        flat = feature.transpose(0, 1).flatten(1)
        match = BatchNormStatistics("match", flat.mean(1), (flat.var(1, correction=0) + EPSILON).sqrt())
        shifted = replace(match, mean=match.mean + torch.tensor([0.0, 0.0, 3.0]))
        spread = replace(match, std=(match.std.square() + 2).sqrt())

        assert variance_distance([feature], [match]).item() == pytest.approx(0, abs=1e-9)
        assert variance_distance([feature], [shifted]).item() == pytest.approx(3.0, rel=1e-4)  # 9 / 3 channels
        assert variance_distance([feature] * 2, [match, spread]).item() == pytest.approx(4 / 2, rel=1e-4)
        assert variance_distance([], []).item() == 0

    @pytest.mark.parametrize("per_sample", [True, False])
    def test_input_distance_is_in_the_units_of_the_input_space(
        self, residual: Network, images: Callable[..., Tensor], per_sample: bool
    ) -> None:
        network = replace(residual, space=of_pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        mean, std = network.input_statistics
        normal = images(4, network.input_shape)
        normal = (normal - normal.mean((2, 3), keepdim=True)) / normal.std((2, 3), keepdim=True, correction=0)

        assert input_distance(network, normal * std + mean, per_sample=per_sample).item() == pytest.approx(0, abs=1e-6)
        assert input_distance(network, (normal + 2) * std + mean, per_sample=per_sample).item() == pytest.approx(12, rel=1e-4)

    def test_labels_are_as_even_as_can_be_in_random_order(self, residual: Network) -> None:
        found = [spread_labels(residual, 23, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]

        assert sorted(torch.bincount(found[0]).tolist()) == [4, 4, 5, 5, 5]
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_a_network_that_scores_no_classes_is_refused(self, fill: Callable[..., nn.Module], residual: Network) -> None:
        shape = (3, 6, 4)
        detector = capture(fill(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), shape), shape)

        assert class_count(residual) == 5
        with pytest.raises(
            OptionError, match=r"gives no class scores, .* its outputs: output \(N, 4, 6, 4\): values by its shape"
        ):
            class_count(detector)
        for method in ("dsg", "intraq", "gdfq"):
            with pytest.raises(OptionError, match="no class scores"):
                synthesize(detector, 2, method=method, steps=1)


class TestStarts:
    def test_published_is_what_is_given_and_procedural_is_not(self, residual: Network) -> None:
        def start(name: str) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return first_images(residual, 2, generator, name, lambda: torch.ones(2, *residual.input_shape))

        assert torch.equal(start("published"), torch.ones(2, *residual.input_shape))
        assert start("procedural").std() > 0.5
        assert all(start(name).requires_grad and start(name).is_leaf for name in ("published", "procedural"))

    def test_an_unknown_one_is_refused(self, residual: Network) -> None:
        with pytest.raises(OptionError, match=r"start is 'dream' \(known: published, procedural\)"):
            synthesize(residual, 2, method="zeroq", start="dream")

    @pytest.mark.parametrize("method", ["zeroq", "rsd"])
    def test_a_tenth_of_the_steps_is_enough_from_there_with_the_short_schedule(self, digits: Path, method: str) -> None:
        network = load(digits / "digits.pt2")

        def last(seed: int, **options: Any) -> float:
            return synthesize(network, 8, method=method, steps=30, seed=seed, **options).losses[-1]

        for seed in (0, 1):
            assert last(seed, start="procedural", schedule="cosine") < 0.8 * last(seed)
