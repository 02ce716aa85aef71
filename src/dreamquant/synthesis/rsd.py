"""Retro-synthesis data."""

import torch
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import (
    Callback,
    gaussian,
    input_distance,
    optimize_images,
    precision,
    spread_labels,
    statistics_distance,
)
from dreamquant.synthesis._procedural import first_images

PAPER = "GVSL, Kumar et al., Hybrid and Non-Uniform DNN Quantization Methods Using Retro Synthesis Data (2020), arXiv 2012.13716"
NEEDS_BATCHNORM = False
BUDGETS = {  # ours: a tenth of ZeroQ's steps, and a twentieth
    "standard": {"steps": 50, "learning_rate": 0.2, "schedule": "cosine", "start": "procedural"},
    "quick": {"steps": 25, "learning_rate": 0.2, "schedule": "cosine", "start": "procedural"},
}


def rsd(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 500,
    learning_rate: float = 0.1,
    patience: int = 100,
    schedule: str = "plateau",
    tolerance: float = 0.0,
    start: str = "published",  # Gaussian noise; "procedural": dead leaves
    class_loss: str = "ce",  # "mse_softmax" is recalled of the paper; its gradient vanishes where there are many classes
    class_weight: float = 1.0,  # 0: of no class, for networks that score none
    per_sample: bool = False,
) -> Samples:
    """Images of chosen classes, Gaussian at the input, that match BatchNorm statistics where there are any.

    total = L_BN / (number of BatchNorms) + L_G + class_weight * L_C; classes are spread evenly over the images. L_BN vanishes
    for a network without BatchNorm. That is algorithm 1 as it is recalled: the abstract says that images come from the
    statistics of the network's layers, the body was not at hand. Learning rate and schedule are ZeroQ's.
    """
    if class_loss not in ("ce", "mse_softmax"):
        raise OptionError(f"rsd.class_loss is {class_loss!r} (known: ce, mse_softmax)")
    generator = torch.Generator().manual_seed(seed)
    targets, graph = batch_norms(network), probe(network)
    images = first_images(network, count, generator, start, lambda: gaussian(network, count, generator))
    labels = spread_labels(network, count, generator) if class_weight else None

    def loss() -> torch.Tensor:
        with precision(network):
            seen = graph(images)
        match = statistics_distance(seen.features, targets, per_sample=per_sample) / max(len(targets), 1)
        normal = input_distance(network, images, per_sample=per_sample)
        if labels is None:
            return match + normal
        if class_loss == "ce":
            classified = F.cross_entropy(seen.scores.float(), labels)
        else:
            shown = seen.scores.float().softmax(1)
            classified = F.mse_loss(shown, F.one_hot(labels, shown.shape[1]).float(), reduction="sum") / count
        return match + normal + class_weight * classified

    losses = optimize_images(
        images,
        loss,
        steps=steps,
        learning_rate=learning_rate,
        patience=patience,
        schedule=schedule,
        tolerance=tolerance,
        callback=callback,
    )
    return Samples(images.detach(), labels, losses=tuple(losses))
