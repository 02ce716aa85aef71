"""Percentile ranges."""

import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.histogram import Values, values_of

PAPER = "McKinstry et al., Discovering Low-Precision Networks Close to Full-Precision Networks (2018)"


def percentile(values: Tensor | Values, *, bits: int, symmetric: bool, percent: float = 99.99) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The range that `percent` of the values of each sign's end keep within; the rest is cut off."""
    if not 50.0 < percent <= 100.0:
        raise OptionError(f"percentile.percent is {percent}; it must be above 50 and at most 100")
    values = values_of(values)
    cut = int((1.0 - percent / 100.0) * values.count)
    points, order = values.points.sort(dim=1)
    below = values.weights.double().gather(1, order).cumsum(1)
    places = [torch.searchsorted(below, below.new_full((len(below), 1), rank)) for rank in (cut + 1, values.count - cut)]
    low, high = (points.gather(1, place).squeeze(1) for place in places)
    return low.clamp(*values.ends), high.clamp(*values.ends)
