"""Levels of least squared error."""

import torch
from torch import Tensor
from torch.nn import functional as F

PAPER = "Han, Mao, Dally, Deep Compression (ICLR 2016), arXiv 1510.00149; Lloyd, Least Squares Quantization in PCM (1982)"

FINE = 4  # cells to a level at the start
HEAVY = 1e6  # what a 0 weighs that holds a level at 0, of all the row's values


def kmeans(rows: Tensor, *, bits: int, steps: int = 100) -> Tensor:
    """Puts each level at the mean of the weights nearest to it, and one at 0: k-means in one dimension.

    There, clusters are intervals of the sorted weights and running sums give their means, so that all rows are worked on at
    once. The start is ours and leaves nothing to chance: 4 * 2^bits cells, most of them over equal parts of the integral of
    density^(1/3) (where many levels are best: Panter and Dite, Quantization Distortion in Pulse-Count Modulation, 1951), merged
    two by two, the pair that costs least first (Ward 1963), until 2^bits are left. Then come at most `steps` of Lloyd's. A row
    of fewer than 2^bits different values other than 0 has them all for levels.
    """
    ordered, sums = _running_sums(rows)
    edges = _merged(_fine_cells(ordered, 2**bits), sums, 2**bits)
    for _ in range(steps):
        levels = _means(sums, edges, ordered)
        between = torch.searchsorted(ordered, (levels[:, 1:] + levels[:, :-1]) / 2)
        moved = torch.cat([edges[:, :1], between, edges[:, -1:]], 1)
        if torch.equal(moved, edges):
            break
        edges = moved
    return _means(sums, edges, ordered).float()


def _running_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sorted values and a heavy 0, (groups, n); the number and the sum of all before each and of all, (2, groups, n + 1)."""
    values = F.pad(rows.double(), (1, 0))
    number = torch.ones_like(values)
    number[:, 0] = HEAVY * rows.shape[1]
    ordered, order = values.sort(1)
    return ordered, F.pad(torch.stack([number.gather(1, order), ordered]).cumsum(2), (1, 0))


def _cells(sums: Tensor, edges: Tensor) -> Tensor:
    """The number and the sum of the values of each cell, (2, groups, cells)."""
    return sums.gather(2, edges.expand(2, *edges.shape)).diff(dim=2)


def _means(sums: Tensor, edges: Tensor, ordered: Tensor) -> Tensor:
    """The mean of each cell, ascending; 0 of the cell that holds the heavy 0, an empty cell's is that of the one before."""
    number, total = _cells(sums, edges)
    means = (total / number.clamp(min=1)).scatter(1, number.argmax(1, keepdim=True), 0.0)
    return torch.maximum(means.where(number > 0, -torch.inf).cummax(1).values, ordered[:, :1])


def _fine_cells(ordered: Tensor, count: int) -> Tensor:
    """The edges (groups, cells + 1) of FINE * `count` cells at most: a cell begins at the value whose number its edge is.

    The `count` widest gaps between neighbours are edges, so that neither an outlier nor one of few values shares its cell. The
    others stand at even steps of the integral of density^(1/3). A gap is 1 / density, and there are density of them to a length:
    gaps^(2/3) add up to that integral.
    """
    gaps, last = ordered.diff(dim=1), ordered.shape[1]
    widest = gaps.topk(min(count, last - 1)).indices
    reach = F.pad(gaps.scatter(1, widest, 0.0).pow(2 / 3).cumsum(1), (1, 0))
    others = torch.arange(1, (FINE - 1) * count, device=reach.device) / ((FINE - 1) * count) * reach[:, -1:]
    inner = torch.cat([widest + 1, torch.searchsorted(reach, others)], 1).sort(1).values
    edges = F.pad(F.pad(inner, (1, 0)), (0, 1), value=last)
    return edges.where(F.pad(edges.diff(dim=1) > 0, (1, 0), value=True), last).sort(1).values  # empty cells come last


def _merged(edges: Tensor, sums: Tensor, count: int) -> Tensor:
    """The edges of `count` cells: again and again those two neighbours become one whose squared error grows least.

    With `excess` pairs to go, a pair among the `excess` cheapest that costs less than those on both sides of it will be merged
    whatever comes before, as costs only grow: all of them can be merged at once.
    """
    while (excess := edges.shape[1] - 1 - count) > 0:
        number, total = _cells(sums, edges)
        apart = (total / number.clamp(min=1)).diff(dim=1).square()
        cost = number[:, 1:] * number[:, :-1] / (number[:, 1:] + number[:, :-1]).clamp(min=1) * apart
        before, behind = F.pad(cost, (1, 0), value=torch.inf)[:, :-1], F.pad(cost, (0, 1), value=torch.inf)[:, 1:]
        ready = (cost == 0) | (cost <= before) & (cost < behind) & (cost <= cost.kthvalue(excess, keepdim=True).values)
        pairs = min(excess, int(ready.sum(1).min()))
        chosen = cost.where(ready, torch.inf).topk(pairs, largest=False).indices
        kept = torch.ones_like(edges, dtype=torch.bool).scatter(1, chosen + 1, False)
        edges = edges[kept].view(len(edges), -1)
    return edges
