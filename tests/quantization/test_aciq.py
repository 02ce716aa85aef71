"""ACIQ's clip constants are the published ones, and clipping by them pays on the distributions they are for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.ranges.aciq import aciq, clip
from dreamquant.quantization.ranges.minmax import minmax

PUBLISHED = {  # for 1 to 9 bits; 9 is the half range's at 8
    "laplace": [1.86, 2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89, 11.16],
    "gauss": [1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2],
}


def laplace(*shape: int, seed: int = 0) -> Tensor:
    """Laplace noise with b = 1."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator).clamp(min=1e-7)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return -uniform.log() * sign


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    flat = x.flatten(1)
    return (grid_of_range(low, high, bits=bits, symmetric=symmetric, axis=0).fake(flat) - flat).square().mean(1)


def predicted(k: float, bits: int, distribution: str) -> float:
    """The paper's error of a clip k of values with b = 1 or sigma = 1."""
    rounding = k**2 / (3 * 4**bits)
    if distribution == "laplace":
        return 2 * math.exp(-k) + rounding
    return (1 + k**2) * (1 - math.erf(k / 2**0.5)) - (2 / math.pi) ** 0.5 * k * math.exp(-(k**2) / 2) + rounding


@pytest.mark.parametrize("distribution", PUBLISHED)
def test_clips_are_the_published_ones(distribution: str) -> None:
    found = [clip(bits, distribution) for bits in range(1, 10)]
    assert found == pytest.approx(PUBLISHED[distribution], abs=0.02)


@pytest.mark.parametrize("distribution", PUBLISHED)
@pytest.mark.parametrize("bits", [1, 4, 9])
def test_clips_have_the_least_predicted_error(distribution: str, bits: int) -> None:
    best = min((step / 1000 for step in range(100, 14_000)), key=lambda k: predicted(k, bits, distribution))
    assert clip(bits, distribution) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("distribution", "draw"), [("laplace", laplace), ("gauss", gauss)])
def test_the_error_is_the_predicted_one_and_less_than_without_clipping(
    distribution: str, draw: Callable[..., Tensor], symmetric: bool
) -> None:
    x = draw(2, 1, 50_000)
    clipped = error(x, *aciq(x, bits=4, symmetric=symmetric, distribution=distribution), bits=4, symmetric=symmetric)
    whole = error(x, *minmax(x, bits=4, symmetric=symmetric), bits=4, symmetric=symmetric)

    assert bool((clipped < 0.6 * whole).all())
    assert clipped.tolist() == pytest.approx([predicted(clip(4, distribution), 4, distribution)] * 2, rel=0.2)


def test_a_range_lies_around_the_mean_or_for_a_symmetric_grid_around_0() -> None:
    x = laplace(1, 1, 50_000) * 0.5 + 2.0
    low, high = aciq(x, bits=4, symmetric=False)
    assert low.item() == pytest.approx(2.0 - 5.03 * 0.5, abs=0.05)
    assert high.item() == pytest.approx(2.0 + 5.03 * 0.5, abs=0.05)

    low, high = aciq(laplace(1, 1, 50_000) + 0.5, bits=4, symmetric=True)
    assert -low.item() == high.item()
    assert high.item() == pytest.approx(5.03 * (0.5 + math.exp(-0.5)), rel=0.02)  # b is then the mean of |x|


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_after_a_relu_the_range_is_that_of_the_values_before_it(mean: float) -> None:
    x = (laplace(1, 4, 50_000) + mean).relu()
    low, high = aciq(x, bits=4, symmetric=False)
    assert low.item() == 0.0
    assert high.item() == pytest.approx(max(mean, 0.0) + clip(5, "laplace"), rel=0.03)

    clipped, whole = (error(x, *ends, bits=4, symmetric=False) for ends in ((low, high), minmax(x, bits=4, symmetric=False)))
    assert clipped < 0.7 * whole

    high = aciq(x, bits=4, symmetric=True)[1]  # half of a symmetric grid's levels
    assert high.item() == pytest.approx(max(mean, 0.0) + clip(4, "laplace"), rel=0.03)


@pytest.mark.parametrize("distribution", ["laplace", "gauss", "auto"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_turned_round_have_the_range_turned_round(distribution: str, symmetric: bool) -> None:
    x = torch.cat([laplace(2, 3, 500), laplace(2, 3, 500).relu()])
    low, high = aciq(x, bits=3, symmetric=symmetric, distribution=distribution)
    mirrored_low, mirrored_high = aciq(-x, bits=3, symmetric=symmetric, distribution=distribution)

    torch.testing.assert_close(mirrored_low, -high)
    torch.testing.assert_close(mirrored_high, -low)


def test_auto_finds_each_groups_distribution() -> None:
    x = torch.stack([laplace(1, 20_000), gauss(1, 20_000), laplace(1, 20_000).relu(), gauss(1, 20_000).relu()])
    highs = {name: aciq(x, bits=4, symmetric=False, distribution=name)[1] for name in ("laplace", "gauss", "auto")}

    assert bool((highs["laplace"] != highs["gauss"]).all())
    assert torch.equal(highs["auto"], torch.where(torch.tensor([True, False, True, False]), highs["laplace"], highs["gauss"]))


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown aciq\.distribution 'laplac'; did you mean 'laplace'\?"):
        aciq(torch.zeros(1, 1, 4), bits=4, symmetric=False, distribution="laplac")
