"""Percentile ranges."""

from torch import Tensor

from dreamquant.errors import OptionError

PAPER = "McKinstry et al., Discovering Low-Precision Networks Close to Full-Precision Networks (2018)"


def percentile(values: Tensor, *, bits: int, symmetric: bool, percent: float = 99.99) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The range that `percent` of the values of each sign's end keep within; the rest is cut off."""
    if not 50.0 < percent <= 100.0:
        raise OptionError(f"percentile.percent is {percent}; it must be above 50 and at most 100")
    flat = values.flatten(1)
    cut = int((1.0 - percent / 100.0) * flat.shape[1])
    low = flat.kthvalue(cut + 1, dim=1).values
    high = flat.kthvalue(flat.shape[1] - cut, dim=1).values
    return low, high
