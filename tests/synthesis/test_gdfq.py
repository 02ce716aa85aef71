"""GDFQ's generator learns to draw images of the classes that it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._loop import variance_distance

SMALL = {"width": 16, "latent": 10, "batch": 32, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, steps: int = 60, **options: Any) -> Samples:
    return synthesize(network, 64, method="gdfq", steps=steps, **{**SMALL, **options})


@pytest.fixture(scope="module")
def samples(trained: Network) -> Samples:
    return dream(trained)


def recognised(network: Network, samples: Samples) -> float:
    assert samples.labels is not None
    return (network(samples.images).argmax(1) == samples.labels).float().mean().item()


def cross_entropy(network: Network, samples: Samples) -> float:
    return F.cross_entropy(network(samples.images), samples.labels).item()  # type: ignore[arg-type]


def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network, samples: Samples) -> None:
    untrained = dream(trained, steps=1)

    assert samples.labels is not None
    assert set(samples.labels.bincount().tolist()) <= set(range(4, 10))  # all of them, nearly even
    assert recognised(trained, samples) > 0.8 > 0.4 > recognised(trained, untrained)
    assert cross_entropy(trained, samples) < 0.3 * cross_entropy(trained, untrained)
    assert samples.losses[-1] < 0.3 * samples.losses[0]


def test_classes_can_steer_the_latents_instead(trained: Network, samples: Samples) -> None:
    embedded = dream(trained, steps=70, conditioning="embedding")

    assert not torch.equal(embedded.images, samples.images)
    assert recognised(trained, embedded) > 0.25  # a tenth by chance
    assert sum(embedded.losses[-5:]) < 0.6 * sum(embedded.losses[:5])


def test_statistics_are_nearer_the_more_they_count(trained: Network) -> None:
    def distance(weight: float) -> float:
        images = dream(trained, statistics_weight=weight).images
        with torch.no_grad():
            return variance_distance(probe(trained)(images).features, batch_norms(trained)).item()

    assert distance(10.0) < 0.6 * distance(0.0)


def test_images_of_a_class_differ(samples: Samples) -> None:
    assert samples.labels is not None
    ones = samples.images[samples.labels == 1].flatten(1)

    assert torch.pdist(ones).min() > 0.1 * ones.std() * ones.shape[1] ** 0.5


@pytest.mark.parametrize("conditioning", ["batchnorm", "embedding"])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_batches_are_whole_whatever_the_count(residual: Network, conditioning: str, count: int) -> None:
    samples = synthesize(
        residual, count, method="gdfq", steps=2, batch=3, latent=4, width=1, conditioning=conditioning, statistics_weight=0.0
    )
    assert samples.images.shape == (count, 3, 11, 9)  # nothing that four divides
    assert samples.labels is not None
    assert samples.labels.shape == (count,)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 1}, "batch is 1; the generator's BatchNorms need at least two images"),
        ({"conditioning": "labels"}, r"conditioning is 'labels' \(known: batchnorm, embedding\)"),
        ({"latent": 0}, "latent is 0"),
        ({"width": -2}, "width is -2"),
    ],
)
def test_impossible_options_are_refused(residual: Network, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        synthesize(residual, 2, method="gdfq", **options)
