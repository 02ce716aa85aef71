"""Averaged min-max ranges."""

from torch import Tensor

PAPER = "Zhang et al., Diversifying Sample Generation for Accurate Data-Free Quantization (CVPR 2021), official code"


def ema(values: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The mean over images of each image's smallest and largest value: single outlying images lose their weight.

    The name is the official code's; with every image weighted alike it is a plain mean.
    """
    low, high = values.aminmax(dim=2)
    return low.mean(1), high.mean(1)
