"""Procedural images have the spectrum and the range of photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels
from dreamquant.synthesis import synthesize


@pytest.fixture(scope="module")
def wide() -> Network:
    """A network for images that are large enough to have a spectrum."""
    return capture(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(1)).eval(), (3, 64, 48))


def slope(images: Tensor) -> float:
    """The slope of the logarithm of power over the logarithm of frequency."""
    grey = images.mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    power = torch.fft.rfft2(grey * torch.hann_window(64).view(-1, 1) * torch.hann_window(48)).abs().square().mean(0)
    frequency = (torch.fft.fftfreq(64).view(-1, 1).square() + torch.fft.rfftfreq(48).square()).sqrt()
    inside = (frequency > 0.04) & (frequency < 0.4)
    x, y = frequency[inside].log(), power[inside].log()
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def test_power_falls_with_the_square_of_frequency(wide: Network) -> None:
    fractal, noise = (synthesize(wide, 24, method=method).images for method in ("fractal", "noise"))

    assert slope(fractal) == pytest.approx(-2.0, abs=0.8)
    assert slope(noise) == pytest.approx(0.0, abs=0.3)


def test_images_keep_to_the_range_of_pixels_where_the_normalisation_is_known(wide: Network) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = synthesize(replace(wide, space=of_pixels(mean, std)), 12, method="fractal").images
    pixels = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)

    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    assert 0.15 < pixels.std() < 0.35


def test_images_differ_in_brightness_and_contrast(wide: Network) -> None:
    images = synthesize(wide, 24, method="fractal").images

    assert images.mean((1, 2, 3)).std() > 0.1
    assert images.std((1, 2, 3)).std() > 0.05


@pytest.mark.parametrize("shape", [(1, 5, 7), (4, 3, 9), (3, 2, 1)])
def test_any_size_is_drawn(shape: tuple[int, int, int]) -> None:
    network = capture(nn.Sequential(nn.Conv2d(shape[0], 2, 1), nn.Flatten(1)).eval(), shape)
    images = synthesize(network, 5, method="fractal").images

    assert images.shape == (5, *shape)
    assert bool(images.isfinite().all())


def test_colour_and_texture_can_be_turned_off(wide: Network, images: Callable[..., Tensor]) -> None:
    drawn = synthesize(wide, 3, method="fractal", chroma=0.0, texture=0.0).images
    channels = (drawn - drawn.mean((0, 2, 3), keepdim=True)) / drawn.std((0, 2, 3), keepdim=True)

    torch.testing.assert_close(channels[:, 0], channels[:, 1], rtol=1e-3, atol=1e-4)
    assert len(drawn[0, 0].unique()) <= 201  # as many colours as leaves, and the ground
