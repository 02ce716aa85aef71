"""Retro-synthesis images are of chosen classes, Gaussian at the input, and near BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize


@pytest.fixture(scope="module", params=["digits.pt2", "digits_bnfolded.onnx"])
def trained(request: pytest.FixtureRequest, digits: Path) -> Network:
    return load(digits / request.param)


def confidence(network: Network, images: Tensor, labels: Tensor) -> float:
    return network(images).softmax(1).gather(1, labels.view(-1, 1)).mean().item()


@pytest.mark.parametrize("class_loss", ["ce", "mse_softmax"])
def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network, class_loss: str) -> None:
    samples = synthesize(trained, 10, method="rsd", steps=40, class_loss=class_loss)
    noise = synthesize(trained, 10, method="noise").images

    assert samples.labels is not None
    assert sorted(samples.labels.tolist()) == list(range(10))  # spread evenly
    assert confidence(trained, samples.images, samples.labels) > 0.8
    assert confidence(trained, noise, samples.labels) < 0.4


def test_statistics_are_nearer_than_noises(digits: Path) -> None:
    network = load(digits / "digits.pt2")
    samples = synthesize(network, 16, method="rsd", steps=40)
    graph, targets = probe(network), batch_norms(network)

    def distance(images: Tensor) -> float:
        with torch.no_grad():
            features = graph(images)[1]
        return sum(
            ((mean - target.mean).square().sum() + (std - target.std).square().sum()).item()
            for (mean, std), target in zip((moments(f, per_sample=False) for f in features), targets, strict=True)
        )

    assert samples.losses[-1] < 0.3 * samples.losses[0]
    assert distance(samples.images) < 0.5 * distance(synthesize(network, 16, method="noise").images)


def test_images_stay_gaussian_at_the_input(trained: Network) -> None:
    images = synthesize(trained, 16, method="rsd", steps=40).images

    assert images.mean().item() == pytest.approx(0.0, abs=0.1)
    assert images.std().item() == pytest.approx(1.0, abs=0.2)


def test_without_batchnorm_and_class_only_the_input_is_matched(fill: Callable[..., nn.Module]) -> None:
    shape = (2, 7, 5)
    network = capture(fill(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(45, 4)), shape), shape)
    samples: Samples = synthesize(network, 4, method="rsd", steps=30, class_weight=0.0)

    assert samples.losses[-1] < 0.01


def test_an_unknown_class_loss_is_refused(residual: Network) -> None:
    with pytest.raises(OptionError, match=r"rsd\.class_loss is 'hinge' \(known: ce, mse_softmax\)"):
        synthesize(residual, 2, method="rsd", class_loss="hinge")
