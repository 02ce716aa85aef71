"""IntraQ's synthetic images: heterogeneous within their class."""

import torch

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._hard import Hard, dream_hard
from dreamquant.synthesis._loop import Callback

PAPER = "Zhong et al., IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity (CVPR 2022), arXiv 2111.09136"
NEEDS_BATCHNORM = True
BUDGETS = {  # ours: a tenth of the published steps, and a fortieth; batches small enough for class centres
    "standard": {"steps": 100, "learning_rate": 0.3, "schedule": "cosine", "batch": 16},
    "quick": {"steps": 25, "learning_rate": 0.3, "schedule": "cosine", "batch": 16},
}


def intraq(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 0.5,
    patience: int = 50,
    schedule: str = "plateau",
    tolerance: float = 0.0,
    target: float = 0.9,  # this and the next three: ImageNet ResNet-18; CIFAR-10 0.95, 0.05, 0.8, 0.5
    lower: float = 0.3,
    upper: float = 0.8,
    crop: float = 0.5,
) -> Samples:
    """Images of chosen classes that keep a distance from the centre of their class, of objects of all sizes, some of them hard.

    total = L_mean + L_var of the batch's BatchNorm inputs + (p_y - t)^2, t in [target, 1] (soft inception loss), on crops with
    probability 0.5 (local object reinforcement), + max(lower - d, 0) + max(d - upper, 0), d the cosine distance to the mean
    feature of the class over earlier batches (marginal distance constraint; the first batch has none).
    """
    hard = Hard(batch, target, lower, upper, crop)
    generator = torch.Generator().manual_seed(seed)
    how = {"steps": steps, "learning_rate": learning_rate, "patience": patience, "schedule": schedule, "tolerance": tolerance}
    return dream_hard(network, count, hard, generator, callback, **how)
