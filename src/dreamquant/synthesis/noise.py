"""Gaussian noise: the baseline that needs no network."""

import torch

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import Callback, gaussian

PAPER = "the baseline of every zero-shot quantization paper"
NEEDS_BATCHNORM = False


def noise(network: Network, count: int, *, seed: int = 0, callback: Callback | None = None) -> Samples:  # noqa: ARG001
    """Independent Gaussian pixels with the mean and deviation of the input space; nothing is optimised."""
    images = gaussian(network, count, torch.Generator().manual_seed(seed))
    return Samples(images)
