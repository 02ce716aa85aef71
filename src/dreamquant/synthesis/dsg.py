"""Diverse sample generation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import (
    Callback,
    gaussian,
    input_distance,
    optimize_images,
    precision,
    spread_labels,
    total_variation,
)
from dreamquant.synthesis._procedural import first_images

PAPER = "Zhang et al., Diversifying Sample Generation for Accurate Data-Free Quantization (CVPR 2021), arXiv 2103.01049"
NEEDS_BATCHNORM = True
BUDGETS = {  # ours: a tenth of the published steps, and a twentieth; more total variation is worth two points at four bits
    "standard": {
        "steps": 50,
        "learning_rate": 0.3,
        "schedule": "cosine",
        "start": "procedural",
        "variation_weight": 0.1,
    },
    "quick": {
        "steps": 25,
        "learning_rate": 0.3,
        "schedule": "cosine",
        "start": "procedural",
        "variation_weight": 0.1,
    },
}


def dsg(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 500,
    learning_rate: float = 0.9,
    patience: int = 260,
    schedule: str = "plateau",
    tolerance: float = 0.0,
    start: str = "published",  # uniform noise in 0..1; "procedural": dead leaves
    slack: bool = True,  # slack distribution alignment
    enhance: bool = True,  # layerwise sample enhancement
    inhibit: bool = False,  # sample correlation inhibition, of the journal version (arXiv 2109.00212)
    percentile: float = 0.9,
    slack_images: int = 64,  # not published
    class_weight: float = 2.0,  # this and the next two: the released code, not the paper's equations
    variation_weight: float = 0.01,
    norm_weight: float = 0.01,
) -> Samples:
    """Images that match BatchNorm statistics within a slack, each one closest at a layer of its own.

    l_i = ||max(|mean - mu_i| - delta_i, 0)||^2 + ||max(|std - sigma_i| - gamma_i, 0)||^2, where delta_i and gamma_i are the
    percentile, over channels, of the gaps on Gaussian noise; sample j minimises sum_i l_i + l_(j mod layers). The input's own
    moments are matched without slack. The gap is a hinge, and a sample is enhanced, as in the paper (the released training code
    does neither).
    """
    if not 0 < percentile <= 1:
        raise OptionError(f"dsg.percentile is {percentile}; it must be above 0 and at most 1")
    if slack_images < 1:
        raise OptionError(f"dsg.slack_images is {slack_images}; at least one is needed")
    generator = torch.Generator().manual_seed(seed)
    targets, graph = batch_norms(network), probe(network)
    noise = gaussian(network, max(slack_images, count), generator)
    with torch.no_grad():
        gaps = [moments(feature, per_sample=False) for feature in graph(noise[:slack_images]).features]
        slacks = [
            ((mean - target.mean).abs().quantile(percentile) * slack, (std - target.std).abs().quantile(percentile) * slack)
            for (mean, std), target in zip(gaps, targets, strict=True)
        ]
    images = first_images(
        network, count, generator, start, lambda: torch.rand((count, *network.input_shape), generator=generator)
    )
    labels = spread_labels(network, count, generator)
    layer = torch.arange(count, device=images.device) % len(targets)
    weights = 1 + enhance * F.one_hot(layer, len(targets))  # (samples, layers): I + 1 1^T

    def loss() -> Tensor:
        with precision(network):
            seen = graph(images)
        layers = []
        for feature, target, (delta, gamma) in zip(seen.features, targets, slacks, strict=True):
            mean, std = moments(feature, per_sample=True)
            layers.append(
                ((mean - target.mean).abs() - delta).relu().square().sum(1)
                + ((std - target.std).abs() - gamma).relu().square().sum(1)
            )
        total: Tensor = (weights * torch.stack(layers, 1)).sum(1).mean() + input_distance(network, images, per_sample=True)
        total = total + class_weight * F.cross_entropy(seen.scores.float(), labels)
        total = total + variation_weight * total_variation(images) + norm_weight * images.flatten(1).norm(dim=1).mean()
        return total + _correlation(images, noise[:count]) / len(targets) if inhibit else total

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


def _correlation(images: Tensor, noise: Tensor) -> Tensor:
    """How far the similarities (cosines) of the images are from those of noise: in eigenvalues and in eigenvectors (GDPP).

    An eigenvector's sign means nothing, so the angle between two counts without it.
    """
    rows = [F.normalize(batch.flatten(1).double(), dim=1) for batch in (images, noise)]
    (values, vectors), (noise_values, noise_vectors) = (torch.linalg.eigh(row @ row.T) for row in rows)
    spread = noise_values - noise_values.min()
    structure = spread / spread.max().clamp(min=1e-12) * (1 - (vectors * noise_vectors).sum(0).abs())
    total: Tensor = 1e-4 * F.mse_loss(values, noise_values) + structure.sum()
    return total.float()
