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
    moment_distance,
    optimize,
    precision,
    spread_labels,
    statistics_distance,
)

PAPER = "Chawla et al., Hybrid and Non-Uniform DNN Quantization Methods Using Retro Synthesis Data (2020), arXiv 2012.13716"
NEEDS_BATCHNORM = False


def rsd(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 500,
    learning_rate: float = 0.1,
    patience: int = 100,
    tolerance: float = 0.0,
    class_loss: str = "ce",  # "mse_softmax" is the paper's; its gradient vanishes where there are many classes
    class_weight: float = 1.0,
    per_sample: bool = False,
) -> Samples:
    """Images of chosen classes, Gaussian at the input, that match BatchNorm statistics where there are any.

    Algorithm 1: total = L_BN / (number of BatchNorms) + L_G + class_weight * L_C; classes are spread evenly over the images.
    L_BN vanishes for a network without BatchNorm. Learning rate and schedule are not published; ZeroQ's schedule is used.
    """
    if class_loss not in ("ce", "mse_softmax"):
        raise OptionError(f"rsd.class_loss is {class_loss!r} (known: ce, mse_softmax)")
    generator = torch.Generator().manual_seed(seed)
    mean, std = network.input_statistics
    targets, graph = batch_norms(network), probe(network)
    images = gaussian(network, count, generator).requires_grad_()
    with torch.no_grad():
        classes = graph(images[: network.batch or 1])[0].shape[-1]
    labels = spread_labels(count, classes, generator)
    unit = (images.new_zeros(mean.numel()), images.new_ones(mean.numel()))

    def loss() -> torch.Tensor:
        with precision():
            logits, features = graph(images)
        match = statistics_distance(features, targets, per_sample=per_sample) / max(len(targets), 1)
        normal = moment_distance((images - mean) / std, *unit, per_sample=per_sample)
        if class_loss == "ce":
            classified = F.cross_entropy(logits.float(), labels)
        else:
            classified = F.mse_loss(logits.float().softmax(1), F.one_hot(labels, classes).float(), reduction="sum") / count
        return match + normal + class_weight * classified

    losses = optimize(
        [images],
        loss,
        steps=steps,
        learning_rate=learning_rate,
        patience=patience,
        tolerance=tolerance,
        callback=callback,
    )
    return Samples(images.detach(), labels, method="rsd", seed=seed, losses=tuple(losses))
