"""Levels of k-means are where scikit-learn's are, or better placed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.codebooks.kmeans import FINE, HEAVY, _cells, _fine_cells, _merged, _running_sums, kmeans
from dreamquant.quantization.codebooks.quartiles import quartiles


def weights(kind: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "pruned":
        return normal * (torch.rand(shape, generator=generator) > 0.7)
    freedom = {"normal": 100, "student": 2}[kind]
    return normal / torch.randn((freedom, *shape), generator=generator).square().mean(0).sqrt()


def error(levels: Tensor, rows: Tensor) -> Tensor:
    return (Codebook(levels, 0).fake(rows) - rows).square().sum(1)


def reference(row: Tensor, count: int) -> Tensor:
    """The levels of the best of ten runs of scikit-learn, one of them held at 0 by a heavy weight there."""
    from sklearn.cluster import KMeans  # here, for it takes a second that only one of the processes need wait
    from sklearn.exceptions import ConvergenceWarning

    points = torch.cat([row, torch.zeros(1)]).double().reshape(-1, 1).numpy()
    heavy = torch.ones(len(points))
    heavy[-1] = HEAVY * len(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(count, n_init=10, random_state=0).fit(points, sample_weight=heavy.numpy())
    return torch.from_numpy(found.cluster_centers_).flatten().sort().values.float()


@pytest.mark.parametrize("kind", ["normal", "student", "pruned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_error_is_that_of_scikit_learn(kind: str, bits: int) -> None:
    rows = weights(kind, 8, 576)
    best = torch.stack([error(reference(row, 2**bits)[None], row[None])[0] for row in rows])
    found = error(kmeans(rows, bits=bits), rows)

    assert (found / best).mean() < 1.06
    assert (found / best).max() < 1.3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [9, 64, 576, 4608])
@pytest.mark.parametrize("kind", ["normal", "student", "pruned"])
def test_error_is_no_larger_than_of_quartiles(kind: str, count: int, bits: int) -> None:
    rows = weights(kind, 30, count, seed=count)
    near = 1.1 if (count, bits) == (9, 2) else 1.0  # few values have many local minima

    assert bool((error(kmeans(rows, bits=bits), rows) <= near * error(quartiles(rows, bits=bits), rows) + 1e-9).all())


def test_levels_are_the_means_of_what_is_nearest_to_them() -> None:
    rows = weights("normal", 4, 576)
    levels = kmeans(rows, bits=3, steps=1000)
    indices = Codebook(levels, 0).indices(rows)
    for row, own, index in zip(rows, levels, indices, strict=True):
        means = torch.stack([row[index == number].mean() for number in range(8)])
        torch.testing.assert_close(own, torch.where(own == 0, 0.0, means), rtol=1e-5, atol=1e-6)


def test_more_steps_bring_less_error() -> None:
    rows = weights("student", 20, 2000)
    none, one, all_ = (error(kmeans(rows, bits=4, steps=steps), rows) for steps in (0, 1, 100))

    assert bool((one <= none).all())
    assert bool((all_ <= one).all())
    assert bool((all_ < 0.95 * none).any())


@pytest.mark.parametrize(("distinct", "bits"), [(3, 2), (15, 4), (200, 8)])
def test_few_values_are_all_levels(distinct: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(6, distinct, generator=generator) ** 3
    for count in (distinct, 5000):
        number = torch.arange(count) % distinct
        rows = own[:, number]
        torch.testing.assert_close(Codebook(kmeans(rows, bits=bits), 0).fake(rows), rows, rtol=1e-6, atol=1e-9)


def test_an_outlier_takes_one_level_and_leaves_the_others() -> None:
    rows = weights("normal", 5, 1000)
    without = error(kmeans(rows, bits=4), rows)
    rows[:, 3] = 1e5
    levels = kmeans(rows, bits=4)

    assert levels[:, -1].tolist() == [1e5] * 5
    assert bool((levels[:, -2] < 10).all())
    assert bool((error(levels, rows) < 1.4 * without).all())


def held(cells: Tensor) -> Tensor:
    """The cells that hold other values than zeros: what is empty or all zeros may be split anyhow."""
    return cells[:, cells[1] != 0]


@pytest.mark.parametrize("kind", ["normal", "student", "pruned"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_merging_many_pairs_at_once_is_merging_one_by_one(kind: str, bits: int) -> None:
    for length in (40, 3000):
        ordered, sums = _running_sums(weights(kind, 6, length))
        edges = _fine_cells(ordered, 2**bits)
        found = _merged(edges, sums, 2**bits)
        for row in range(6):
            left, own = edges[row].tolist(), sums[:, row : row + 1]
            while len(left) > 2**bits + 1:
                number, total = _cells(own, torch.tensor([left]))[:, 0]
                mean = total / number.clamp(min=1)
                both = (number[1:] + number[:-1]).clamp(min=1)
                cost = number[1:] * number[:-1] / both * (mean[1:] - mean[:-1]) ** 2
                del left[int(cost.argmin()) + 1]
            one_by_one, at_once = _cells(own, torch.tensor([left])), _cells(own, found[row : row + 1])
            assert torch.equal(held(one_by_one), held(at_once))


def test_the_start_has_as_many_cells_where_a_cube_root_of_the_density_says() -> None:
    """Half the values over [0, 1], half over [1, 9]: half as many levels to a length, over eight times the length."""
    ordered = torch.cat([torch.linspace(0, 1, 40_001), torch.linspace(1, 9, 40_001)[1:]]).double().unsqueeze(0)
    ordered[:, -3:] += torch.tensor([100, 200, 300])
    edges = _fine_cells(ordered, 64)[0]
    starts = ordered[0][edges[:-1].clamp(max=ordered.shape[1] - 1)]

    assert len(edges) == FINE * 64 + 1
    assert set(range(80_001 - 3, 80_001)) <= set(edges.tolist())  # the widest gaps
    others = (FINE - 1) * 64
    dense = int((starts < 1).sum())
    assert dense == pytest.approx(others * 2 / (2 + 8), abs=2)
