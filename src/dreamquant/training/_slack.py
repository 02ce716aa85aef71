"""BatchNorm statistics with slack, each sample closest at a layer of its own: DSG's distance, for a generator."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.synthesis._loop import gaussian
from dreamquant.training._sources import Distance


def slack_distance(network: Network, generator: torch.Generator, *, percentile: float, images: int, enhance: bool) -> Distance:
    """l_i = mean over channels of max(|mean - mu_i| - delta_i, 0)^2 + max(|std - sigma_i| - gamma_i, 0)^2, of each sample.

    delta_i and gamma_i are the percentile, over channels, of the gaps on so many images of Gaussian noise. Sample j has the mean
    over the layers of l_i, with l_(j mod layers) counted twice where they are enhanced (X_LSE = I + 1 1^T); then the mean over
    samples. Means where the paper sums keep the weight what it is for GDFQ's loss.
    """
    if not 0 < percentile <= 1:
        raise OptionError(f"percentile is {percentile}; it must be above 0 and at most 1")
    if images < 1:
        raise OptionError(f"slack_images is {images}; at least one is needed")
    targets = batch_norms(network)
    with torch.no_grad():
        gaps = [moments(feature, per_sample=False) for feature in probe(network)(gaussian(network, images, generator)).features]
    slacks = [
        ((mean - target.mean).abs().quantile(percentile), (std - target.std).abs().quantile(percentile))
        for (mean, std), target in zip(gaps, targets, strict=True)
    ]

    def distance(features: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=CPU)
        for layer, (feature, target, (delta, gamma)) in enumerate(zip(features, targets, slacks, strict=True)):
            mean, std = moments(feature, per_sample=True)
            gap = ((mean - target.mean).abs() - delta).relu().square() + ((std - target.std).abs() - gamma).relu().square()
            weights = 1 + enhance * (torch.arange(len(feature), device=feature.device) % len(targets) == layer)
            total = total + (weights * gap.mean(1)).mean() / len(targets)
        return total

    return distance
