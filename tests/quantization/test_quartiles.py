"""Three clusters share the levels by count and range, and nothing is worse off than on a uniform grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.codebooks.quartiles import _clusters, _steps, quartiles
from dreamquant.quantization.grid import grid_of_range

SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]


def heavy(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Weights of a distribution with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "laplace":
        exponential = -torch.log1p(-torch.rand(shape, generator=generator))
        return exponential * torch.randn(shape, generator=generator).sign()
    freedom = {"student": 3}[kind]
    chi = torch.randn((freedom, *shape), generator=generator).square().mean(0)
    return torch.randn(shape, generator=generator) / chi.sqrt()


def error(levels: Tensor, rows: Tensor) -> Tensor:
    return (Codebook(levels, 0).fake(rows) - rows).square().mean(1)


def uniform_error(rows: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    grid = grid_of_range(*rows.aminmax(dim=1), bits=bits, symmetric=symmetric, axis=0)
    return (grid.fake(rows) - rows).square().mean(1)


def test_clusters_are_those_of_the_fences() -> None:
    body = torch.linspace(-1, 1, 101)  # quartiles -0.5 and 0.5, fences -2 and 2
    rows = torch.cat([body, torch.tensor([-9.0, -3.0, 1.9, 2.5, 5.0, 7.0])]).unsqueeze(0)
    rows = rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))]
    number, low, high = _clusters(rows, 1.5)

    assert number.tolist() == [[2, 102, 3]]
    torch.testing.assert_close(low, torch.tensor([[-9.0, -1.0, 2.5]]).double())
    torch.testing.assert_close(high, torch.tensor([[-3.0, 1.9, 7.0]]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fence", [0.0, 1.5, 100.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 30])
def test_every_weight_is_in_a_cluster_and_the_body_is_never_empty(count: int, fence: float) -> None:
    rows = heavy("student", 20, count, seed=count)
    number, low, high = _clusters(rows, fence)

    assert number.sum(1).tolist() == [count] * 20
    assert bool((number[:, 1] >= 1).all())
    assert bool((low <= high).all())
    assert bool((torch.where(number > 0, low, torch.inf).amin(1) == rows.amin(1)).all())
    assert bool((torch.where(number > 0, high, -torch.inf).amax(1) == rows.amax(1)).all())


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [2, 9, 27, 500])
def test_steps_add_up_to_all_levels(count: int, bits: int, share: float) -> None:
    rows = heavy("student", 50, count, seed=bits)
    number, low, high = _clusters(rows, 1.5)
    steps = _steps(number, low, high, share=share, count=2**bits)

    assert steps.sum(1).tolist() == [2**bits] * 50
    assert bool((steps[number == 0] == 0).all())
    assert bool((steps[:, [0, 2]][((number > 0) & (low == high))[:, [0, 2]]] == 1).all())
    assert bool((steps[:, 1] >= 2).all())
    if bits > 2:
        assert bool((steps[high > low] >= 2).all())


@pytest.mark.parametrize("share", SHARES)
def test_where_each_cluster_is_one_value_the_body_repeats_its_own(share: float) -> None:
    number, low, high = _clusters(torch.tensor([[3.0] * 9, [0.0] * 9, [0.0] * 8 + [5.0], [-1.0] + [2.0] * 8]), 1.5)
    steps = _steps(number, low, high, share=share, count=8)

    assert steps.tolist() == [[0, 8, 0], [0, 8, 0], [0, 7, 1], [1, 7, 0]]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        # 16 levels for 10, 80, 10 % of the weights over 1/2, 1/4, 1/4 of the ranges
        (1.0, [2, 12, 2]),  # 1.6, 12.8, 1.6: two at least, which the body gives
        (0.75, [3, 11, 2]),  # 3.2, 10.6, 2.2
        (0.5, [5, 8, 3]),  # 4.8, 8.4, 2.8
        (0.0, [8, 4, 4]),
    ],
)
def test_steps_are_shared_by_count_and_range(share: float, expected: list[int]) -> None:
    number = torch.tensor([[10, 80, 10]])
    low, high = torch.tensor([[-9.0, -1.0, 2.0]]).double(), torch.tensor([[-5.0, 1.0, 4.0]]).double()

    assert _steps(number, low, high, share=share, count=16).tolist() == [expected]


def test_levels_are_even_within_each_cluster() -> None:
    body = torch.linspace(-1, 1, 801)
    rows = torch.cat([body, torch.linspace(-9, -5, 100), torch.linspace(3, 4, 100)]).unsqueeze(0)
    levels = quartiles(rows, bits=4, share=0.5, search=False)[0]
    low, inner, high = levels[levels < -1], levels[(levels >= -1) & (levels <= 1)], levels[levels > 1]
    # 16 (0.5 x 100 / 1001 + 0.5 x 4 / 7) = 5.4, 16 (0.5 x 801 / 1001 + 0.5 x 2 / 7) = 8.7, 16 (0.05 + 0.5 / 7) = 1.9
    assert (len(low), len(inner), len(high)) == (5, 9, 2)
    torch.testing.assert_close(low, torch.linspace(-9, -5, 5))
    torch.testing.assert_close(inner, torch.linspace(-1, 1, 9))
    torch.testing.assert_close(high, torch.tensor([3.0, 4.0]))


def test_the_bodys_nearest_level_is_moved_to_zero() -> None:
    rows = torch.linspace(-1, 2, 301).unsqueeze(0)
    levels = quartiles(rows, bits=3, search=False)[0]
    even = torch.linspace(-1, 2, 8)
    even[2] = 0.0  # -1/7

    torch.testing.assert_close(levels, even)


def test_a_body_of_one_value_leaves_the_levels_to_the_tails() -> None:
    """More than half the weights pruned: both quartiles are 0."""
    rows = heavy("laplace", 1, 400)
    rows[:, 100:] = 0
    levels = quartiles(rows, bits=4, search=False)[0]

    assert int((levels == 0).sum()) == 1
    assert int((levels < 0).sum()) + int((levels > 0).sum()) == 15
    assert levels[0] == rows.amin()
    assert levels[-1] == rows.amax()


def test_two_bits_are_enough_for_three_clusters() -> None:
    rows = torch.cat([torch.linspace(-1, 1, 100), torch.tensor([-8.0, -6.0, 5.0, 9.0])]).unsqueeze(0)

    torch.testing.assert_close(quartiles(rows, bits=2, search=False), torch.tensor([[-7.0, 0.0, 1.0, 7.0]]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["laplace", "student"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_error_is_no_larger_than_on_a_uniform_grid(kind: str, bits: int, symmetric: bool) -> None:
    for count in (9, 64, 576, 4608):
        rows = heavy(kind, 40, count, seed=count)
        even = uniform_error(rows, bits=bits, symmetric=symmetric)
        assert bool((error(quartiles(rows, bits=bits), rows) <= even * (1 + 1e-5)).all())


@pytest.mark.parametrize("kind", ["laplace", "student"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_papers_clusters_alone_have_less_error_on_heavy_tails(kind: str, bits: int) -> None:
    rows = heavy(kind, 40, 2304)
    ratio = error(quartiles(rows, bits=bits, search=False), rows) / uniform_error(rows, bits=bits, symmetric=True)

    assert ratio.mean() < 0.9
    assert ratio.max() < 1.2


def test_the_search_is_of_the_shares_and_of_the_uniform_grids() -> None:
    rows = heavy("student", 30, 100)
    shares = torch.stack([error(quartiles(rows, bits=4, share=share, search=False), rows) for share in SHARES])
    grids = torch.stack([uniform_error(rows, bits=4, symmetric=symmetric) for symmetric in (True, False)])
    found = error(quartiles(rows, bits=4), rows)

    torch.testing.assert_close(found, torch.cat([shares, grids]).amin(0), rtol=1e-4, atol=0)
    assert len(set(shares.argmin(0).tolist())) >= 3  # and no single share would have done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"quartiles\.share is 1\.5; it must be from 0 to 1"),
        ({"share": float("nan")}, r"quartiles\.share is nan"),
        ({"fence": -0.1}, r"quartiles\.fence is -0\.1; it must not be negative"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quartiles(torch.ones(1, 4), bits=4, **options)  # type: ignore[arg-type]
