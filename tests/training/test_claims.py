"""What the papers claim, on a small trained network at three bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamquant.methods import method_names
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.scores import top1_agreement
from dreamquant.network.statistics import batch_norms
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.training import train
from dreamquant.training._slack import slack_distance


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


@pytest.fixture(scope="module")
def samples(trained: Network) -> Samples:
    return synthesize(trained, 48, method="gdfq", steps=40, batch=16, learning_rate=0.01, width=16, latent=10)


@pytest.fixture(scope="module")
def student(trained: Network, samples: Samples) -> Student:
    return quantize(trained, samples, bits="W3A3", plan="zeroq")


@pytest.mark.parametrize("method", method_names("training"))
def test_the_student_answers_more_like_its_teacher(
    trained: Network, samples: Samples, student: Student, images: Callable[..., Tensor], method: str
) -> None:
    settings: dict[str, Any] = {
        "epochs": 3,
        "iterations": 10,
        "warm_up": 1,
        "range_epochs": 1,
        "batch": 24,
        "learning_rate": 1e-3,
        "clip": 2.0,
        "width": 16,
        "latent": 10,
        "generator_rate": 1e-2,
    }
    if method == "lrq":
        settings["crop"] = 0.0  # a mirrored digit is none
    found = train(trained, student, samples, method=method, **settings)
    for shown, least in ((samples.images, 15), (images(200, trained.input_shape, seed=5), 5)):
        before, after = (top1_agreement(trained(shown), one(shown)) for one in (student, found))
        assert after > before + least


def test_gaps_within_the_slack_cost_nothing_and_each_sample_is_enhanced_at_its_layer(trained: Network) -> None:
    targets = batch_norms(trained)
    generator = torch.Generator().manual_seed(0)

    def features(gap: float) -> list[Tensor]:
        """Samples whose every channel has its BatchNorm's mean and deviation, but for the gap between the means."""
        wave = torch.tensor([-1.0, 1.0]).view(1, 1, 2)
        return [(target.mean + gap).view(1, -1, 1) + target.std.view(1, -1, 1) * wave.expand(3, -1, -1) for target in targets]

    for enhance in (False, True):
        distance = slack_distance(trained, generator, percentile=0.9, images=16, enhance=enhance)
        assert distance(features(0.0)).item() < 1e-6
        assert distance(features(1e-3)).item() < 1e-6
        wide = 1e3  # next to which the slack is nothing
        assert distance(features(wide)).item() == pytest.approx((1 + enhance / len(targets)) * wide**2, rel=0.02)

        only = features(0.0)
        only[1] = only[1].clone()
        only[1][2] += wide  # the third sample, at the second layer
        one = distance(only).item()
        only[1] = features(0.0)[1].clone()
        only[1][1] += wide  # the second sample, whose own layer it is
        assert distance(only).item() == pytest.approx((1 + enhance) * one, rel=0.02)


def test_slack_is_narrower_the_lower_the_percentile(trained: Network) -> None:
    noise = [torch.randn(4, len(target.mean), 30, generator=torch.Generator().manual_seed(1)) for target in batch_norms(trained)]
    costs = [
        slack_distance(trained, torch.Generator().manual_seed(0), percentile=percentile, images=16, enhance=False)(noise).item()
        for percentile in (0.1, 0.5, 0.9, 1.0)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.9 * costs[0]
