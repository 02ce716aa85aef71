"""Ranges of least error."""

import torch
from torch import Tensor

from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.histogram import Values, summarize, values_of

PAPER = "Li et al., BRECQ (ICLR 2021), and Jeon et al., Genie (CVPR 2023): search of the clipping range"


def mse(values: Tensor | Values, *, bits: int, symmetric: bool, power: float = 2.4, steps: int = 100) -> tuple[Tensor, Tensor]:
    """The range c * [min, max], c in {1, 1 - 1/steps, ..., 1/steps}, with the least mean |x - quantized x|^power."""
    values = values_of(values)
    low, high = values.ends
    points, weights = summarize(values)
    best = torch.full_like(low, torch.inf)
    best_ratio = torch.ones_like(low)
    for step in range(steps):
        ratio = 1.0 - step / steps
        grid = grid_of_range(low * ratio, high * ratio, bits=bits, symmetric=symmetric, axis=0)
        error = ((grid.fake(points) - points).abs_().pow_(power) * weights).sum(1)
        better = error < best
        best, best_ratio = torch.where(better, error, best), torch.where(better, ratio, best_ratio)
    return low * best_ratio, high * best_ratio
