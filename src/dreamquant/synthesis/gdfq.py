"""GDFQ's class-conditional generator."""

import torch

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._conditional import dream_with_generator
from dreamquant.synthesis._loop import Callback

PAPER = "Xu et al., Generative Low-bitwidth Data Free Quantization (ECCV 2020), arXiv 2003.03603"
NEEDS_BATCHNORM = True
BUDGETS = {"standard": {"steps": 200, "width": 64}, "quick": {"steps": 60, "width": 32}}  # ours


def gdfq(
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
    """Images of chosen classes from a generator that was trained on the network.

    L_G = cross entropy + statistics_weight * mean over BatchNorms of (MSE of means + MSE of variances). GDFQ trains its generator
    on, together with the student; 800 steps are the 4 epochs before its student learns on CIFAR.
    """
    return dream_with_generator(
        network,
        count,
        torch.Generator().manual_seed(seed),
        callback,
        attention=False,
        conditioning=conditioning,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        statistics_weight=statistics_weight,
        latent=latent,
        width=width,
        tolerance=tolerance,
    )
