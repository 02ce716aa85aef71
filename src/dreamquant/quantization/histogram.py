"""Histograms that stand for many values."""

import torch
from torch import Tensor

BINS = 4096
EXACT = 2**24  # float32, in which torch counts, knows no 2^24 + 1


def counted(row: Tensor, bins: int, low: float, high: float) -> Tensor:
    """How many of the values (n,) each of `bins` equal parts of [low, high] holds, exactly: (bins,), float64."""
    return torch.stack([torch.histc(piece, bins, low, high).double() for piece in torch.split(row, EXACT)]).sum(0)


def summarize(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Points and their weights (groups, n), for values (groups, N): the values themselves, or a histogram of many.

    The weights of a histogram are counts in float64.
    """
    if flat.shape[1] <= BINS:
        return flat, torch.ones_like(flat)
    low, high = flat.aminmax(dim=1)
    counts, centres = [], []
    for row, first, last in zip(flat, low.tolist(), high.tolist(), strict=True):
        last = max(last, first + 1e-30)
        counts.append(counted(row, BINS, first, last))
        centres.append(first + (last - first) / BINS * (torch.arange(BINS) + 0.5))
    return torch.stack(centres), torch.stack(counts)
