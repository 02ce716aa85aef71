"""IntraQ's images are of chosen classes, some of them hard, and keep a distance from the centre of their class."""

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
from dreamquant.synthesis._hard import crop_and_flip


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, **options: Any) -> Samples:
    """Three batches, each with one image of each class; the last two have centres."""
    return synthesize(network, 30, method="intraq", **{"steps": 20, "batch": 10, "seed": 1, **options})


@pytest.fixture(scope="module")
def samples(trained: Network) -> Samples:
    return dream(trained)


def confidences(network: Network, samples: Samples) -> Tensor:
    assert samples.labels is not None
    return network(samples.images).softmax(1).gather(1, samples.labels.view(-1, 1)).squeeze(1)


def distances(network: Network, samples: Samples, batch: int = 10) -> Tensor:
    """Cosine distance of each image, but those of the first batch, to the mean of its class over earlier batches."""
    assert samples.labels is not None
    with torch.no_grad():
        seen = probe(network)(samples.images).embedding
    found = []
    for index in range(batch, len(seen)):
        before = torch.arange(len(seen)) < index // batch * batch
        centre = seen[before & (samples.labels == samples.labels[index])].mean(0)
        found.append(1 - F.cosine_similarity(seen[index], centre, dim=0))
    return torch.stack(found)


def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network, samples: Samples) -> None:
    assert samples.labels is not None
    assert torch.equal(samples.labels.bincount(), torch.full((10,), 3))  # spread evenly
    assert confidences(trained, samples).mean() > 0.7
    assert confidences(trained, Samples(synthesize(trained, 30, method="noise").images, samples.labels)).mean() < 0.4


def test_images_keep_a_distance_from_the_centre_of_their_class(trained: Network, samples: Samples) -> None:
    free = distances(trained, dream(trained, lower=0.0, upper=2.0)).mean()

    assert distances(trained, samples).mean() > 1.3 * free
    assert distances(trained, dream(trained, lower=0.0, upper=0.01)).mean() < 0.9 * free


def test_a_lower_target_makes_some_of_them_hard(trained: Network) -> None:
    hard, easy = (confidences(trained, dream(trained, target=target, lower=0.0, upper=2.0)) for target in (0.2, 1.0))

    assert hard.mean() < easy.mean() - 0.05
    assert hard.std() > easy.std()
    assert hard.quantile(0.7) > 0.8  # about half of them are asked for all of the confidence


def test_the_first_batch_has_no_centres(residual: Network) -> None:
    near, far = (
        synthesize(residual, 10, method="intraq", steps=4, batch=5, lower=lower, upper=2.0).images for lower in (0.0, 1.9)
    )
    assert torch.equal(near[:5], far[:5])
    assert not torch.allclose(near[5:], far[5:], atol=1e-2)


def test_progress_counts_on_over_the_batches(residual: Network) -> None:
    told: list[tuple[int, int]] = []
    samples = synthesize(
        residual, 7, method="intraq", steps=3, batch=3, callback=lambda done, total, _: told.append((done, total))
    )
    assert told == [(step + 1, 9) for step in range(9)]
    assert len(samples.losses) == 9


class TestCropAndFlip:
    @pytest.fixture
    def coordinates(self) -> Tensor:
        """(N, 2, 20, 30): where a pixel is, from -1 to 1, across and down."""
        across, down = ((torch.arange(size) + 0.5) / size * 2 - 1 for size in (30, 20))
        return torch.stack([across.expand(20, 30), down.view(-1, 1).expand(20, 30)]).repeat(400, 1, 1, 1)

    def test_a_constant_image_stays_as_it_is(self) -> None:
        images = torch.tensor([0.3, -2.0, 5.0]).view(1, 3, 1, 1).expand(6, 3, 11, 9)

        torch.testing.assert_close(crop_and_flip(images, 0.5, torch.Generator().manual_seed(0)), images)

    @pytest.mark.parametrize("smallest", [0.1, 0.5])
    def test_crops_have_the_area_and_the_sides_that_were_asked_for(self, coordinates: Tensor, smallest: float) -> None:
        found = crop_and_flip(coordinates, smallest, torch.Generator().manual_seed(0))
        assert found.shape == coordinates.shape

        across = (found[:, 0, :, 16] - found[:, 0, :, 13]).mean(1) / 6 * 30  # the share of the width that is seen
        down = (found[:, 1, 11] - found[:, 1, 8]).mean(1) / 6 * 20
        area, aspect = across.abs() * down, across.abs() / down
        assert smallest - 1e-3 < area.min() < smallest + 0.1
        assert 0.9 < area.max() < 1 + 1e-3
        assert 0.75 - 1e-3 < aspect.min() < 0.78
        assert 1.28 < aspect.max() < 4 / 3 + 1e-3
        assert 0.4 < (across < 0).float().mean() < 0.6  # mirrored
        assert bool((down > 0).all())  # never upside down

        middle = found[:, :, 9:11, 14:16].mean((2, 3))
        assert bool((middle[:, 0].abs() + across.abs() <= 1 + 1e-3).all())  # within the image
        assert bool((middle[:, 1].abs() + down <= 1 + 1e-3).all())
        assert middle.amin() < -0.3
        assert middle.amax() > 0.3

    def test_a_seed_gives_the_same_crops(self, images: Callable[..., Tensor]) -> None:
        x = images(4, (3, 11, 9))
        one, same, other = (crop_and_flip(x, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))

        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_gradients_reach_the_images(self, images: Callable[..., Tensor]) -> None:
        x = images(4, (3, 11, 9)).requires_grad_()
        crop_and_flip(x, 0.5, torch.Generator().manual_seed(0)).square().sum().backward()

        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert bool(x.grad.flatten(1).any(1).all())


@pytest.mark.parametrize("crop", [0.0, -1.0, 1.5, math.nan])
def test_an_impossible_crop_is_refused(residual: Network, crop: float) -> None:
    with pytest.raises(OptionError, match=f"crop is {crop}"):
        synthesize(residual, 2, method="intraq", crop=crop)
