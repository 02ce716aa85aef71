"""Min-max ranges."""

from torch import Tensor

from dreamquant.quantization.histogram import Values, values_of

PAPER = "Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (CVPR 2018)"


def minmax(values: Tensor | Values, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The smallest and the largest value: nothing is cut off, outliers widen the steps."""
    low, high = values_of(values).ends
    return low, high
