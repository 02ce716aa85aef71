"""Genie's images come from generators that learn, with their latent vectors, to show what BatchNorms remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dreamquant.synthesis.genie
from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels
from dreamquant.network.load import load
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._loop import Group, optimize
from dreamquant.synthesis.genie import _swing

SMALL = {"width": 16, "latent": 16}


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, count: int = 16, **options: Any) -> Samples:
    return synthesize(network, count, method="genie", **{**SMALL, "steps": 3, **options})


@pytest.fixture(scope="module")
def samples(trained: Network) -> Samples:
    return dream(trained, steps=60)


def distance(network: Network, images: Tensor) -> float:
    with torch.no_grad():
        found = [moments(feature, per_sample=False) for feature in probe(network)(images).features]
    return sum(
        (F.mse_loss(mean, target.mean) + F.mse_loss(std, target.std)).item()
        for (mean, std), target in zip(found, batch_norms(network), strict=True)
    )


def test_the_loss_falls_and_statistics_are_nearer_than_noises(trained: Network, samples: Samples) -> None:
    assert len(samples.losses) == 60
    assert samples.losses[-1] < 0.4 * samples.losses[0]
    assert distance(trained, samples.images) < 0.3 * distance(trained, synthesize(trained, 16, method="noise").images)
    assert samples.labels is None


@pytest.mark.parametrize("normalised", [False, True])
def test_images_have_the_moments_of_the_input_space(residual: Network, normalised: bool) -> None:
    network = replace(residual, space=of_pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))) if normalised else residual
    images = dream(network).images
    mean, std = (value.flatten().tolist() for value in network.input_statistics)

    assert images.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=0.02)
    assert images.std((0, 2, 3)).tolist() == pytest.approx(std, rel=0.05)


def test_the_loss_looks_at_each_image_alone_too(trained: Network) -> None:
    start, end = (dream(trained, steps=steps).images for steps in (1, 60))

    def far(images: Tensor) -> float:
        return (images.mean((1, 2, 3)).square() + (images.std((1, 2, 3)) - 1).square()).mean().item()

    assert far(end) < 0.6 * far(start)


def test_each_group_has_its_own_generator(trained: Network) -> None:
    told: list[tuple[int, int]] = []
    samples = dream(trained, 11, batch=4, callback=lambda done, total, _: told.append((done, total)))
    groups = samples.images.split([3, 4, 4])

    assert told == [(step + 1, 9) for step in range(9)]
    assert len(samples.losses) == 9
    for group in groups:  # its last BatchNorm has seen these images, and no others
        assert group.mean().item() == pytest.approx(0, abs=1e-4)
        assert group.std(correction=0).item() == pytest.approx(1, abs=0.02)
    assert samples.images[:2].mean().abs() > 1e-3
    assert not torch.equal(groups[1], groups[2])
    with pytest.raises(OptionError, match="batch is 0; at least one image"):
        dream(trained, batch=0)


def test_latents_and_generator_both_learn_each_at_its_rate(trained: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[list[Tensor]] = []

    def watched(groups: Sequence[Group], loss: Callable[[], Tensor], **options: Any) -> list[float]:
        groups = [replace(group, parameters=list(group.parameters)) for group in groups]
        before = [[parameter.detach().clone() for parameter in group.parameters] for group in groups]
        losses = optimize(groups, loss, **options)
        for group, old in zip(groups, before, strict=True):
            moved.append([(new.detach() - one).abs() for new, one in zip(group.parameters, old, strict=True)])
        return losses

    monkeypatch.setattr(dreamquant.synthesis.genie, "optimize", watched)
    dream(trained, steps=1)
    (latents,), weights = moved

    assert latents.shape == (16, 16)
    assert latents.median().item() == pytest.approx(0.1, rel=0.02)  # Adam's first step is the learning rate
    assert all(weight.max() < 0.0102 for weight in weights)
    assert sum(weight.max().item() > 0.009 for weight in weights) >= len(weights) - 3  # biases before BatchNorm change nothing


class TestSwing:
    def test_it_shifts_the_reflected_input_by_a_pixel_at_most(self, images: Callable[..., Tensor]) -> None:
        x, generator = images(2, (3, 5, 4)), torch.Generator().manual_seed(0)
        around = F.pad(x, (1, 1, 1, 1), mode="reflect")
        seen = set()
        for _ in range(100):
            found = _swing(x, generator)
            assert found.shape == x.shape
            at = [(i, j) for i in range(3) for j in range(3) if torch.equal(found, around[..., i : i + 5, j : j + 4])]
            assert len(at) == 1
            seen.update(at)

        assert len(seen) == 9

    @pytest.mark.parametrize("shape", [(3, 1, 4), (3, 4, 1), (3, 1, 1), (3, 8), (3, 4, 4, 4)])
    def test_a_pixel_has_nothing_to_reflect_and_sequences_and_volumes_do_not_swing(
        self, images: Callable[..., Tensor], shape: tuple[int, ...]
    ) -> None:
        x = images(2, shape)

        assert torch.equal(_swing(x, torch.Generator()), x)

    def test_it_changes_the_images_of_a_network_with_strides_and_no_others(self, trained: Network, residual: Network) -> None:
        for network, same in ((trained, False), (residual, True)):
            assert torch.equal(dream(network, 4).images, dream(network, 4, swing=False).images) is same

    def test_the_network_itself_does_not_swing(self, trained: Network, images: Callable[..., Tensor]) -> None:
        code, x = trained.graph.code, images(4, trained.input_shape)
        scores = trained(x)
        dream(trained, 4)

        assert trained.graph.code == code
        assert torch.equal(trained(x), scores)


@pytest.mark.parametrize("option", ["decay_every", "patience", "latent", "width"])
def test_impossible_options_are_refused(residual: Network, option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} is 0"):
        dream(residual, 2, **{option: 0})
