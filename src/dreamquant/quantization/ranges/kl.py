"""Ranges of least divergence."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.histogram import Values, values_of
from dreamquant.quantization.plan import LARGEST_BITS

PAPER = "Migacz, 8-bit Inference with TensorRT (GTC 2017): entropy calibration"

CELLS = 4  # of a histogram's half to a level, at least: a level of fewer hides what it does to the density
VALUES = 8  # to a cell: with fewer, the divergence is that of chance
STEP = 0.98  # from one candidate to the next
EMPTY = 1e-4  # of a value: what an empty end cell counts where the values that were cut off land on it
TINY = 1e-30
TOGETHER = 1024  # candidates of all groups that are tried at once


def kl(values: Tensor | Values, *, bits: int, symmetric: bool, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """The range [max(min, -t), min(max, t)] after which the histogram, put on the grid's levels, has diverged least.

    For each t: P is the histogram within the range, values outside added to its end cells; Q is the histogram within the range
    with each of 2^bits equal parts of it (of [-t, t] on a symmetric grid) spread evenly over the part's cells that hold values.
    The least KL(P || Q) wins, the widest range of those as good. t goes from the largest magnitude down in steps of 2 %, to
    where a part is one cell.

    Two things differ from the talk. Q keeps the values' number for its total, so that what is cut off is missing from it;
    normalised, a range around few values would have no divergence at all. And exact zeros are not counted: they are a level of
    every grid, and a spike of them would pull every range towards 0.

    `bins` cells cover [0, t], and as many [-t, 0]; fewer where there are not 8 values to each. A group with fewer than
    32 * 2^bits values other than 0 (512 at 4 bits, 8192 at 8) tells no density: its range is its smallest and largest value,
    which is also the best that one can do where there are fewer values than levels.

    Raises `OptionError` for fewer than 4 * 2^bits bins, and 8 bits or less.
    """
    levels = 2**bits
    if bits > LARGEST_BITS:  # no histogram has cells for so many levels
        return values_of(values).ends
    if bins < CELLS * levels:
        raise OptionError(f"kl.bins is {bins}; {bits} bits need at least {CELLS * levels}")
    values = values_of(values)
    low, high = values.ends
    if values.count < VALUES * CELLS * levels:
        return low, high
    cells = min(bins, int(values.count) // VALUES)
    reach = torch.maximum(high, -low).clamp(min=TINY)
    counts = values.cells(reach, cells)
    sums = _running_sums(counts)
    first = (low / reach * cells).floor().long().clamp(max=0)
    last = (high / reach * cells).ceil().long().clamp(min=0)
    cuts = torch.tensor(list(_cuts(cells, levels // 2)), device=counts.device)
    divergences = [
        _divergence(counts[rows], sums[:, rows], first[rows], last[rows], cuts, levels=levels, symmetric=symmetric)
        for rows in torch.split(torch.arange(len(counts), device=counts.device), max(1, TOGETHER // len(cuts)))
    ]
    best = torch.full_like(counts[:, 0], torch.inf)
    share = torch.ones_like(low)
    for cut, divergence in zip(cuts.tolist(), torch.cat(divergences).unbind(1), strict=True):
        better = divergence < best - 1e-9
        best, share = torch.where(better, divergence, best), torch.where(better, cut / cells, share)
    enough = counts.sum(1) >= VALUES * CELLS * levels
    end = torch.where(enough, share, 1.0) * reach
    return torch.maximum(low, -end).minimum(high), torch.minimum(high, end).maximum(low)


def _cuts(cells: int, least: int) -> Iterator[int]:
    """The candidate ranges' ends, in cells from 0, the widest first."""
    cut = cells
    while cut >= least:
        yield cut
        cut = min(cut - 1, int(cut * STEP))


def _running_sums(counts: Tensor) -> Tensor:
    """Sums of all cells before each of: the counts, the cells that hold values, count * log(count). (3, groups, cells + 1)."""
    parts = torch.stack([counts, (counts > 0).double(), torch.xlogy(counts, counts)])
    return torch.nn.functional.pad(parts.cumsum(2), (1, 0))


def _divergence(
    counts: Tensor, sums: Tensor, first: Tensor, last: Tensor, cuts: Tensor, *, levels: int, symmetric: bool
) -> Tensor:
    """KL(P || Q) per value of each group's ranges, from cell `first` up to cell `last` as counted from 0, within each of `cuts`
    cells from 0: (groups, cuts)."""
    low, high = torch.maximum(first[:, None], -cuts)[..., None], torch.minimum(last[:, None], cuts)[..., None]
    start, stop = (torch.minimum(low, -high), torch.maximum(high, -low)) if symmetric else (low, high)
    edges = (start + (stop - start) * (torch.arange(levels + 1, device=counts.device) / levels)).round().long()
    edges = torch.maximum(torch.minimum(edges, high), low) + counts.shape[1] // 2
    number, filled, entropy = sums.gather(2, edges.flatten(1).expand(3, -1, -1)).view(3, *edges.shape)
    inside, cells = number.diff(), filled.diff().clamp(min=1)
    divergence = entropy[..., -1] - entropy[..., 0] - torch.xlogy(inside, inside / cells).sum(-1)
    total = sums[0, :, -1:]
    for cell, outside, level in ((edges[..., 0], number[..., 0], 0), (edges[..., -1] - 1, total - number[..., -1], -1)):
        count = counts.gather(1, cell.clamp(0, counts.shape[1] - 1))
        spread = torch.where(count > 0, inside[..., level] / cells[..., level], EMPTY)
        moved = torch.xlogy(count + outside, count + outside) - torch.xlogy(count, count) - torch.xlogy(outside, spread)
        divergence = divergence + torch.where(outside > 0, moved, 0.0)
    return torch.where(number[..., -1] > number[..., 0], divergence / total, torch.inf)
