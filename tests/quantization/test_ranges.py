"""Every ranges method keeps the contract, and each the promise of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.methods import Method, find_method, method_names
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.histogram import BINS, summarize

METHODS = [find_method("ranges", name) for name in method_names("ranges")]


def values(*shape: int, seed: int = 0) -> Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def error(x: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool, power: float = 2.0) -> Tensor:
    flat = x.flatten(1)
    fake = grid_of_range(low, high, bits=bits, symmetric=symmetric, axis=0).fake(flat)
    return (fake - flat).abs().pow(power).mean(1)


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 5, 49), (1, 1, 7), (6, 1, 1), (2, 3, BINS)])
def test_a_range_lies_within_the_values(method: Method, shape: tuple[int, int, int], bits: int, symmetric: bool) -> None:
    x = values(*shape)
    before = x.clone()
    low, high = method.function(x, bits=bits, symmetric=symmetric)

    assert low.shape == high.shape == shape[:1]
    assert torch.equal(x, before)
    assert bool((low <= high).all())
    assert bool((low >= x.flatten(1).amin(1)).all() | (x.flatten(1).amin(1) > 0).all())
    assert bool((high <= x.flatten(1).amax(1)).all() | (x.flatten(1).amax(1) < 0).all())


def test_groups_do_not_know_of_each_other(method: Method) -> None:
    x = values(4, 3, 50) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, 1)
    together = torch.stack(method.function(x, bits=4, symmetric=True))
    alone = [torch.cat(method.function(group[None], bits=4, symmetric=True)) for group in x]

    torch.testing.assert_close(together, torch.stack(alone, 1))


def test_values_of_one_sign_and_constants_give_a_range(method: Method) -> None:
    for x in (torch.zeros(2, 1, 9), torch.full((1, 2, 9), 3.0), -values(1, 1, 33).abs()):
        low, high = method.function(x, bits=4, symmetric=False)
        assert bool(low.isfinite().all())
        assert bool(high.isfinite().all())
        assert bool((low <= high).all())


def test_a_method_says_what_it_does_and_where_it_comes_from(method: Method) -> None:
    assert method.paper
    assert method.summary.endswith(".") or method.summary
    assert method.module.__doc__


def test_minmax_cuts_nothing_off() -> None:
    x = values(3, 2, 20)
    low, high = find_method("ranges", "minmax").function(x, bits=8, symmetric=True)

    assert torch.equal(low, x.amin((1, 2)))
    assert torch.equal(high, x.amax((1, 2)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_mse_errs_less_than_minmax_on_heavy_tails(bits: int, symmetric: bool) -> None:
    x = values(5, 1, 2000)
    ends = [find_method("ranges", name).function(x, bits=bits, symmetric=symmetric) for name in ("mse", "minmax")]
    mse, minmax = (error(x, *end, bits=bits, symmetric=symmetric, power=2.4) for end in ends)

    assert bool((mse <= minmax).all())
    assert mse.sum() < 0.8 * minmax.sum()


def test_mse_obeys_its_power() -> None:
    x = values(1, 1, 3000)
    mse = find_method("ranges", "mse").function
    gentle, strict = (mse(x, bits=4, symmetric=True, power=power)[1] for power in (1.0, 8.0))

    assert gentle < strict  # the higher the power, the more a cut-off outlier costs


def test_mse_on_a_histogram_is_as_good_as_on_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(2, 1, 20_000)
    mse = find_method("ranges", "mse").function
    summarised = error(x, *mse(x, bits=4, symmetric=False), bits=4, symmetric=False, power=2.4)
    monkeypatch.setattr("dreamquant.quantization.histogram.BINS", 10**9)
    exact = error(x, *mse(x, bits=4, symmetric=False), bits=4, symmetric=False, power=2.4)

    assert bool((summarised <= 1.05 * exact).all())


@pytest.mark.parametrize("size", [BINS, BINS + 1, 3 * BINS])
def test_a_histogram_counts_every_value_once(size: int) -> None:
    flat = values(2, size)
    points, weights = summarize(flat)

    assert weights.sum(1).tolist() == [size, size]
    mean = (points * weights).sum(1) / size
    width = (flat.amax(1) - flat.amin(1)) / BINS
    assert bool(((mean - flat.mean(1)).abs() <= width).all())


def test_a_histogram_of_one_value_repeated_stays_at_it() -> None:
    points, weights = summarize(torch.full((1, 2 * BINS), 2.5))

    assert (points * weights).sum().item() == pytest.approx(2.5 * 2 * BINS, rel=1e-4)


def test_percentile_ignores_a_lone_outlier() -> None:
    x = values(1, 1, 20_000).clamp(-3, 3)
    x[0, 0, 0] = 1e6
    low, high = find_method("ranges", "percentile").function(x, bits=8, symmetric=False, percent=99.9)

    assert high.item() <= 3.0
    assert low.item() >= -3.0


def test_percentile_of_100_is_minmax() -> None:
    x = values(2, 2, 33)
    ends = [
        find_method("ranges", "percentile").function(x, bits=8, symmetric=False, percent=100.0),
        find_method("ranges", "minmax").function(x, bits=8, symmetric=False),
    ]

    assert torch.equal(torch.stack(ends[0]), torch.stack(ends[1]))


@pytest.mark.parametrize("percent", [50.0, 0.0, 100.1, float("nan")])
def test_an_impossible_percent_is_refused(percent: float) -> None:
    with pytest.raises(OptionError, match=r"percentile\.percent is"):
        find_method("ranges", "percentile").function(values(1, 1, 9), bits=8, symmetric=False, percent=percent)


def test_ema_weakens_an_image_that_stands_out() -> None:
    x = values(1, 8, 100).clamp(-2, 2)
    x[0, 3] *= 50
    low, high = find_method("ranges", "ema").function(x, bits=8, symmetric=False)

    assert high < 0.5 * x.max()
    assert low > 0.5 * x.min()


def test_ema_of_one_image_is_minmax() -> None:
    x = values(3, 1, 40)
    low, high = find_method("ranges", "ema").function(x, bits=8, symmetric=False)

    assert torch.equal(low, x.amin((1, 2)))
    assert torch.equal(high, x.amax((1, 2)))
