"""LRQ's margin moves the angles to the class centre: IntraQ's images, closer to it or farther from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.statistics import probe
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._hard import shifted_cosine


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, margin: float, **options: Any) -> Samples:
    """Three batches, each with one image of each class; the last two have centres."""
    return synthesize(network, 30, method="lrq", margin=margin, **{"steps": 30, "batch": 10, "seed": 1, **options})


@pytest.fixture(scope="module")
def positive(trained: Network) -> Samples:
    return dream(trained, 0.5)


def distances(network: Network, samples: Samples) -> Tensor:
    """Cosine distance of the images of the last two batches to the mean of their class in the first."""
    assert samples.labels is not None
    with torch.no_grad():
        seen = probe(network)(samples.images).embedding
    centres = torch.empty(10, seen.shape[1]).index_copy_(0, samples.labels[:10], seen[:10])
    return 1 - F.cosine_similarity(seen[10:], centres[samples.labels[10:]])


def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network, positive: Samples) -> None:
    assert positive.labels is not None
    assert torch.equal(positive.labels.bincount(), torch.full((10,), 3))  # spread evenly
    assert (trained(positive.images).argmax(1) == positive.labels).float().mean() >= 0.85
    assert min(positive.losses[20:30]) < 0.7 * positive.losses[0]


def test_a_positive_margin_brings_images_closer_to_their_class_than_none_or_a_negative_one(
    trained: Network, positive: Samples
) -> None:
    closer, without, farther = (
        distances(trained, samples).mean() for samples in (positive, dream(trained, 0.0), dream(trained, -0.5))
    )
    assert closer < 0.8 * min(without, farther)


def test_without_a_margin_it_is_intraq(residual: Network) -> None:
    settings = {"steps": 5, "batch": 4, "seed": 3}
    intraq = synthesize(residual, 9, method="intraq", **settings)
    lrq = synthesize(residual, 9, method="lrq", margin=0.0, **settings)

    assert torch.equal(lrq.images, intraq.images)
    assert lrq.losses == intraq.losses
    assert not torch.equal(synthesize(residual, 9, method="lrq", **settings).images, intraq.images)


def test_the_first_batch_knows_no_margin(residual: Network) -> None:
    one, other = (
        synthesize(residual, 10, method="lrq", steps=5, batch=5, margin=margin, lower=0.9, upper=0.9).images
        for margin in (0.5, -0.5)
    )
    assert torch.equal(one[:5], other[:5])
    assert not torch.allclose(one[5:], other[5:], atol=1e-2)


class TestShiftedCosine:
    @pytest.mark.parametrize("margin", [-math.pi / 2, -0.5, 0.0, 0.3, math.pi / 2])
    def test_it_is_the_cosine_of_the_angle_and_the_margin(self, margin: float) -> None:
        angles = torch.linspace(0.01, 3.13, 50)
        features = torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(0.1, 9, 50).view(-1, 1)
        centres = torch.tensor([[3.0, 0.0]]).expand(50, 2)

        turned = angles + margin
        expected = torch.where(turned < 0, 2 - turned.cos(), torch.where(turned > math.pi, -2 - turned.cos(), turned.cos()))
        found = shifted_cosine(features, centres, margin)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        assert bool((found.diff() < 1e-4).all())  # falls with the angle: a distance made of it rises

    @pytest.mark.parametrize("turn", [1.0, -1.0])
    @pytest.mark.parametrize("margin", [-0.5, 0.0, 0.5])
    def test_gradients_are_finite_on_the_centre_and_opposite(
        self, images: Callable[..., Tensor], margin: float, turn: float
    ) -> None:
        centres = images(4, (6,))
        features = (turn * centres).requires_grad_()
        found = shifted_cosine(features, centres, margin)
        found.sum().backward()  # type: ignore[no-untyped-call]
        size = 2 - math.cos(margin) if margin * turn < 0 else math.cos(margin)  # beyond 0 and pi it goes on

        torch.testing.assert_close(found, torch.full((4,), turn * size), rtol=0, atol=2e-3)
        assert features.grad is not None
        assert bool(features.grad.isfinite().all())


@pytest.mark.parametrize("margin", [1.6, -1.6, math.pi, math.nan, math.inf])
def test_a_margin_beyond_a_right_angle_is_refused(residual: Network, margin: float) -> None:
    with pytest.raises(OptionError, match=rf"lrq\.margin is {margin}; it is an angle in radians"):
        synthesize(residual, 2, method="lrq", margin=margin)
