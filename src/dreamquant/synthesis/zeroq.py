"""ZeroQ's distilled data."""

import torch

from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import Callback, input_distance, optimize_images, precision, statistics_distance
from dreamquant.synthesis._procedural import first_images

PAPER = "Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework (CVPR 2020), arXiv 2001.00281"
NEEDS_BATCHNORM = True
BUDGETS = {  # ours: a tenth of the published steps, and a twentieth
    "standard": {"steps": 50, "learning_rate": 0.4, "schedule": "cosine", "start": "procedural"},
    "quick": {"steps": 25, "learning_rate": 0.4, "schedule": "cosine", "start": "procedural"},
}


def zeroq(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 500,
    learning_rate: float = 0.5,
    patience: int = 100,
    schedule: str = "plateau",
    tolerance: float = 0.0,  # ours; the published schedule runs all its steps
    start: str = "published",  # nearly nothing; "procedural": dead leaves
    start_deviation: float = 0.0136,  # the official code divides by the variance, so it starts from almost nothing
) -> Samples:
    """Images whose statistics match those that each BatchNorm remembers.

    Minimises, for each image, sum_l ||mean_l - mu_l||^2 + ||std_l - sigma_l||^2 over the inputs of all BatchNorms and the image
    itself (mean 0, deviation 1 in a normalised input space), with Adam. Deviation from the official code: features are taken
    where BatchNorms really are, not at the first n convolutions.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = network.space.statistics(network.input_shape[0])
    spread = start_deviation * 12**0.5 * std
    images = first_images(
        network,
        count,
        generator,
        start,
        lambda: (torch.rand((count, *network.input_shape), generator=generator) - 0.5) * spread + mean,
    )
    targets, graph = batch_norms(network), probe(network)

    def loss() -> torch.Tensor:
        with precision(network):
            seen = graph(images)
        match = statistics_distance(seen.features, targets, per_sample=True)
        return match + input_distance(network, images, per_sample=True)

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
    return Samples(images.detach(), losses=tuple(losses))
