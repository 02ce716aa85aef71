"""PSAQ-ViT's images hold patches that a transformer tells apart, as those of photographs and unlike those of noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.network.attention import probe_attention
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._loop import total_variation
from dreamquant.synthesis.psaq import patch_entropy


def entropy(network: Network, images: Tensor) -> float:
    with torch.no_grad():
        return sum(patch_entropy(patches).mean().item() for patches in probe_attention(network)(images)[1])


def test_entropy_of_patch_similarity_rises_over_the_run_and_above_noises(transformer: Network) -> None:
    alone = {"class_weight": 0.0, "variation_weight": 0.0, "jitter": 0.0}
    found = [
        entropy(transformer, synthesize(transformer, 8, method="psaq", steps=steps, **alone).images) for steps in (1, 10, 50)
    ]
    whole = entropy(transformer, synthesize(transformer, 8, method="psaq", steps=100).images)
    noise = entropy(transformer, synthesize(transformer, 8, method="noise").images)

    assert found[0] < found[1] < found[2]
    assert found[2] > whole > noise + 0.5


def test_images_are_of_the_classes_that_were_asked_for(transformer: Network) -> None:
    samples = synthesize(transformer, 10, method="psaq", steps=60)

    assert samples.labels is not None
    assert sorted(samples.labels.tolist()) == sorted(list(range(5)) * 2)  # spread evenly
    assert (transformer(samples.images).argmax(1) == samples.labels).float().mean() >= 0.7
    assert samples.losses[-1] < samples.losses[0]


def test_total_variation_nears_the_one_that_is_given(transformer: Network) -> None:
    samples = synthesize(transformer, 8, method="psaq", steps=60, variation_weight=5.0)
    variation = total_variation(samples.images).item() / samples.images.numel() ** 0.5

    assert variation == pytest.approx(1.25, rel=0.25)


def test_images_keep_to_the_range_of_pixels_where_the_normalisation_is_known(transformer: Network) -> None:
    network = replace(transformer, space=of_pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    images = synthesize(network, 2, method="psaq", steps=5).images
    pixels = images * torch.tensor(network.std).view(-1, 1, 1) + torch.tensor(network.mean).view(-1, 1, 1)

    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_entropy_is_that_of_a_known_density(images: Callable[..., Tensor]) -> None:
    width = 64  # the cosine of two random directions is nearly normal, with variance 1 / width
    found = patch_entropy(images(3, (200, width)))

    assert found.tolist() == pytest.approx([0.5 * math.log(2 * math.pi * math.e / width)] * 3, abs=0.05)


@pytest.mark.parametrize("bandwidth", [0.0, 0.01])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_are_finite_for_identical_patches(value: float, bandwidth: float) -> None:
    patches = torch.full((2, 5, 3), value, requires_grad=True)
    found = patch_entropy(patches, bandwidth=bandwidth)
    found.sum().backward()  # type: ignore[no-untyped-call]

    assert bool(found.isfinite().all())
    assert patches.grad is not None
    assert bool(patches.grad.isfinite().all())


def test_a_network_that_scores_no_classes_is_asked_for_none(fill: Callable[..., nn.Module]) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            y: Tensor = nn.functional.scaled_dot_product_attention(x, x, x)
            return y

    network = capture(fill(Dense(), (3, 8, 6)), (3, 8, 6))
    with pytest.raises(OptionError, match=r"gives no class scores, .* its outputs: output \(N, 12, 4\)"):
        synthesize(network, 2, method="psaq")
    assert synthesize(network, 2, method="psaq", steps=2, class_weight=0.0).labels is None


@pytest.mark.parametrize(("option", "value"), [("bandwidth", -1.0), ("points", 1), ("jitter", 2.0)])
def test_impossible_options_are_refused(transformer: Network, option: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"psaq\.{option} is {value}"):
        synthesize(transformer, 2, method="psaq", **{option: value})
