"""Class-driven dreams that stay near procedural images: for networks without BatchNorm."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.live import at_once
from dreamquant.network.statistics import piecewise, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import Callback, Group, arranged, cosine, optimize, precision, spread_labels
from dreamquant.synthesis._procedural import procedural
from dreamquant.transform.fold_batchnorm import fold_batchnorm

PAPER = "this project: procedural images (see `fractal`) as the prior that BatchNorm statistics are elsewhere"
NEEDS_BATCHNORM = False
BUDGETS = {"quick": {"steps": 10}}


def anchored(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 30,
    learning_rate: float = 0.05,
    coarse: int = 4,  # pixels of the image to one of what is learned: no fine pattern that fools the network
    shift: float = 0.05,  # share of the image's size that each step rolls the images by, at most
    anchor_weight: float = 0.1,
    diversity_weight: float = 1.0,
) -> Samples:
    """Procedural images changed, coarsely and little, until the network sees a class in each of them.

    Minimises cross entropy with evenly spread classes + anchor_weight * mean squared change, in deviations of the input space, +
    diversity_weight * mean cosine between the features of different images. What photographs have and procedural images lack is
    objects: the late layers answer to them, and their ranges are too narrow without.
    """
    if coarse < 1:
        raise OptionError(f"anchored.coarse is {coarse}; at least one pixel is needed")
    generator = torch.Generator().manual_seed(seed)
    folded = fold_batchnorm(network)
    graph = piecewise(probe(folded, features=False), at_once(folded, count, kept=True))
    _, std = network.input_statistics
    start = arranged(procedural(network, count, generator).to(network.device))
    labels = spread_labels(network, count, generator)
    height, width = start.shape[2:]
    change = start.new_zeros(count, len(std), -(-height // coarse), -(-width // coarse)).requires_grad_()

    def changed() -> Tensor:
        return start + F.interpolate(change, size=(height, width), mode="bilinear", align_corners=False) * std

    def loss() -> Tensor:
        down, right, mirror = torch.rand(3, generator=generator).tolist()
        images = changed().roll((round((2 * down - 1) * shift * height), round((2 * right - 1) * shift * width)), (2, 3))
        with precision(network):
            seen = graph(images.flip(3) if mirror < 0.5 else images)
        direction = F.normalize(seen.embedding.float(), dim=1)
        alike = (direction.sum(0).square().sum() - count) / max(count * (count - 1), 1)
        return F.cross_entropy(seen.scores.float(), labels) + anchor_weight * change.square().mean() + diversity_weight * alike

    group = Group([change], learning_rate, cosine(steps), betas=(0.7, 0.9))
    losses = optimize([group], loss, steps=steps, callback=callback)
    return Samples(changed().detach(), labels, losses=tuple(losses))
