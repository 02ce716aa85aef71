"""LRQ's hard samples: IntraQ's, with an adversarial margin on the angle to the class centre."""

import math

import torch

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._hard import Hard, dream_hard
from dreamquant.synthesis._loop import Callback

PAPER = "Long-Range Zero-Shot Generative Deep Network Quantization (Neural Networks 166, 2023), arXiv 2211.06816"
NEEDS_BATCHNORM = True
BUDGETS = {  # ours: a tenth of the published steps, and a fortieth; batches small enough for class centres
    "standard": {"steps": 100, "learning_rate": 0.3, "schedule": "cosine", "batch": 16},
    "quick": {"steps": 25, "learning_rate": 0.3, "schedule": "cosine", "batch": 16},
}


def lrq(
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
    target: float = 0.9,
    lower: float = 0.3,
    upper: float = 0.8,
    crop: float = 0.5,
    margin: float = 0.5,  # radians; above 0, as released, moves images closer to their class's centre, below 0 farther away
) -> Samples:
    """Images of chosen classes within a band of angles to the centre of their class, moved by an adversarial margin.

    IntraQ's objective (see `intraq`) with cos(theta + margin) in place of cos(theta) in the distance to the class centre. The
    released code makes its training images so; the paper's long-range generator is `lrq_generator`.
    """
    if not -math.pi / 2 <= margin <= math.pi / 2:
        raise OptionError(f"lrq.margin is {margin}; it is an angle in radians from -pi/2 to pi/2")
    hard = Hard(batch, target, lower, upper, crop, margin)
    generator = torch.Generator().manual_seed(seed)
    how = {"steps": steps, "learning_rate": learning_rate, "patience": patience, "schedule": schedule, "tolerance": tolerance}
    return dream_hard(network, count, hard, generator, callback, **how)
