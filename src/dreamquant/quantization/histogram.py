"""Histograms that stand for many values."""

import torch
from torch import Tensor

BINS = 4096


def summarize(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Points and their weights (groups, n), for values (groups, N): the values themselves, or a histogram of many."""
    if flat.shape[1] <= BINS:
        return flat, torch.ones_like(flat)
    low, high = flat.aminmax(dim=1)
    counts, centres = [], []
    for row, first, last in zip(flat, low.tolist(), high.tolist(), strict=True):
        last = max(last, first + 1e-30)
        counts.append(torch.histc(row, BINS, first, last))
        centres.append(first + (last - first) / BINS * (torch.arange(BINS) + 0.5))
    return torch.stack(centres), torch.stack(counts)
