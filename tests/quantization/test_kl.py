"""Ranges of least divergence cut outliers off, and nothing else."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.ranges.kl import _cuts, kl
from dreamquant.quantization.ranges.minmax import minmax


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    flat = x.flatten(1)
    return (grid_of_range(low, high, bits=bits, symmetric=symmetric, axis=0).fake(flat) - flat).square().mean(1)


def divergence(counts: list[float], cells: int, cut: int, levels: int) -> float:
    """KL(P || Q) by the definition, cell by cell: two-sided counts, cut at `cut` cells from the middle."""
    kept = counts[cells - cut : cells + cut]
    p, q = list(kept), [0.0] * len(kept)
    p[0] += sum(counts[: cells - cut])
    p[-1] += sum(counts[cells + cut :])
    edges = [round(2 * cut * level / levels) for level in range(levels + 1)]
    for start, stop in pairwise(edges):
        filled = [cell for cell in range(start, stop) if kept[cell]]
        for cell in filled:
            q[cell] = sum(kept[start:stop]) / len(filled)
    p, q = torch.tensor(p).double(), torch.tensor(q).double()
    q = torch.where((q == 0) & (p > 0), 1e-4, q)
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum() / p.sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_is_the_least_of_the_definitions_divergences(symmetric: bool) -> None:
    x = normal(1, 1, 8000) * normal(1, 1, 8000, seed=1).exp()
    x = torch.cat([x, -x], 2)  # both ends as far from 0
    bins, levels = 256, 16
    reach = float(x.abs().max())
    counts = torch.histc(x[x != 0], 2 * bins, -reach, reach).tolist()
    low, high = kl(x, bits=4, symmetric=symmetric, bins=bins)

    best = min(_cuts(bins, levels // 2), key=lambda cut: divergence(counts, bins, cut, levels))
    assert levels < best < bins
    assert -low.item() == high.item() == pytest.approx(reach * best / bins)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_lone_outlier_is_cut_off(side: float, symmetric: bool) -> None:
    x = normal(2, 1, 20_000)
    body = x.abs().max().item()
    x[:, 0, 7] = side * 60.0
    low, high = kl(x, bits=4, symmetric=symmetric)
    clipped = error(x, low, high, bits=4, symmetric=symmetric)
    whole = error(x, *minmax(x, bits=4, symmetric=symmetric), bits=4, symmetric=symmetric)

    assert bool(((high if side > 0 else -low) < 2 * body).all())
    assert bool((clipped < 0.5 * whole).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-0.5, 0.0, -1.0, 2.0])
def test_uniform_values_are_kept_whole(shift: float, bits: int, symmetric: bool) -> None:
    x = uniform(3, 2, 10_000) + shift
    ends = kl(x, bits=bits, symmetric=symmetric)

    assert torch.equal(torch.stack(ends), torch.stack(minmax(x, bits=bits, symmetric=symmetric)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rare_tails_are_cut_where_levels_are_few(bits: int) -> None:
    x = uniform(4, 1, 50_000).clamp(min=1e-7).log() * normal(4, 1, 50_000).sign()  # Laplace noise
    for values in (x, x.relu(), -x.relu()):
        ends = [method(values, bits=bits, symmetric=False) for method in (kl, minmax)]
        clipped, whole = (error(values, *end, bits=bits, symmetric=False) for end in ends)
        assert bool((clipped < 0.7 * whole).all())


def test_zeros_do_not_pull_the_range_in() -> None:
    x = normal(1, 1, 30_000)
    with_zeros = torch.cat([x, torch.zeros(1, 5, 30_000)], 1)

    assert torch.equal(torch.stack(kl(with_zeros, bits=4, symmetric=True)), torch.stack(kl(x, bits=4, symmetric=True)))


@pytest.mark.parametrize(("bits", "least"), [(2, 128), (4, 512), (8, 8192)])
def test_a_group_of_few_values_is_kept_whole(bits: int, least: int) -> None:
    x = normal(3, 1, least) ** 5
    few, enough = x[:, :, :-1], x
    sparse = x * (torch.arange(least) > 0)  # one zero, and what is left is not enough either

    for values in (few, sparse, x[:, :, :9]):
        whole = torch.stack(minmax(values, bits=bits, symmetric=False))
        assert torch.equal(torch.stack(kl(values, bits=bits, symmetric=False)), whole)
    whole = torch.stack(minmax(enough, bits=bits, symmetric=False))
    assert not torch.equal(torch.stack(kl(enough, bits=bits, symmetric=False)), whole)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-35])
def test_a_group_of_one_value_is_kept_whole(value: float, symmetric: bool) -> None:
    x = torch.full((2, 1, 20_000), value)
    low, high = kl(x, bits=8, symmetric=symmetric)

    assert low.tolist() == high.tolist() == x[:, 0, 0].tolist()


def test_many_channels_take_little_time() -> None:
    x = normal(512, 1, 4608)
    start = time.perf_counter()
    kl(x, bits=4, symmetric=True)

    assert time.perf_counter() - start < 5.0  # 0.2 s on one slow core


def test_too_few_bins_are_refused() -> None:
    with pytest.raises(OptionError, match=r"kl\.bins is 1000; 8 bits need at least 1024"):
        kl(normal(1, 1, 10), bits=8, symmetric=False, bins=1000)
