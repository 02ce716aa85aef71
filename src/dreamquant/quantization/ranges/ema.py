"""Averaged min-max ranges."""

from torch import Tensor

from dreamquant.quantization.histogram import Values, values_of

PAPER = "Zhang et al., Diversifying Sample Generation for Accurate Data-Free Quantization (CVPR 2021), official code"


def ema(values: Tensor | Values, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The mean over images of each image's smallest and largest value: single outlying images lose their weight.

    The name is the official code's; with every image weighted alike it is a plain mean.
    """
    values = values_of(values)
    return values.lows.mean(1), values.highs.mean(1)
