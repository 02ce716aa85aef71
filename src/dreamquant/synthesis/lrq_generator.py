"""LRQ's long-range generator."""

import torch

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._conditional import dream_with_generator
from dreamquant.synthesis._loop import Callback

PAPER = "Long-Range Zero-Shot Generative Deep Network Quantization (Neural Networks 166, 2023), arXiv 2211.06816"
NEEDS_BATCHNORM = True
BUDGETS = {"standard": {"steps": 200, "width": 64}, "quick": {"steps": 60, "width": 32}}  # ours


def lrq_generator(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 800,
    batch: int = 16,
    learning_rate: float = 1e-3,
    statistics_weight: float = 0.1,
    latent: int = 100,
    width: int = 128,
    conditioning: str = "batchnorm",  # classes steer the BatchNorms (ImageNet form) or, "embedding", the latents (CIFAR form)
    tolerance: float = 0.0,
) -> Samples:
    """Images of chosen classes from a generator with an attention of large kernels, trained on the network.

    GDFQ's generator and loss (see `gdfq`), with DW 5x5 -> DW 7x7 dilation 3 -> 1x1 attention behind its first block. 800 steps
    are the 4 epochs for which the released code uses it; the paper's abstract lets it drive the training.
    """
    return dream_with_generator(
        network,
        count,
        torch.Generator().manual_seed(seed),
        callback,
        attention=True,
        conditioning=conditioning,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        statistics_weight=statistics_weight,
        latent=latent,
        width=width,
        tolerance=tolerance,
    )
