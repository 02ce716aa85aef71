"""A class-conditional generator trained on a network: what GDFQ and LRQ's long-range generator share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._generators import ClassGenerator, initialised
from dreamquant.synthesis._loop import (
    Callback,
    Group,
    arranged,
    class_count,
    decay,
    gaussian,
    optimize,
    precision,
    spread_labels,
    variance_distance,
)


def dream_with_generator(
    network: Network,
    count: int,
    generator: torch.Generator,
    callback: Callback | None,
    *,
    attention: bool,
    conditioning: str,
    steps: int,
    batch: int,
    learning_rate: float,
    statistics_weight: float,
    latent: int,
    width: int,
    tolerance: float,
) -> Samples:
    """Trains the generator by L_G = CE(network(G(z, y)), y) + statistics_weight * L_BNS, then draws `count` images from it."""
    if conditioning not in ("batchnorm", "embedding"):
        raise OptionError(f"conditioning is {conditioning!r} (known: batchnorm, embedding)")
    if batch < 2:
        raise OptionError(f"batch is {batch}; the generator's BatchNorms need at least two images")
    targets, graph = batch_norms(network), probe(network)
    classes = class_count(network, gaussian(network, network.batch or 1, generator))
    maker = initialised(
        ClassGenerator(
            network.input_shape, classes, latent, width, by_embedding=conditioning == "embedding", attention=attention
        ),
        generator,
    )
    mean, std = network.input_statistics

    def draw(labels: Tensor) -> Tensor:
        latents = torch.randn((len(labels), latent), generator=generator)
        return arranged(maker(latents, labels).float() * std + mean)

    def loss() -> Tensor:
        labels = torch.randint(classes, (batch,), generator=generator)
        with precision():
            seen = graph(draw(labels))
        return F.cross_entropy(seen.scores.float(), labels) + statistics_weight * variance_distance(seen.features, targets)

    group = Group(maker.parameters(), learning_rate, decay(lambda _: 1.0), betas=(0.5, 0.999))
    losses = optimize([group], loss, steps=steps, tolerance=tolerance, callback=callback)
    wanted = spread_labels(-(-count // batch) * batch, classes, generator)  # whole batches: the generator's BatchNorms see those
    with torch.no_grad():
        images = torch.cat([draw(labels) for labels in torch.split(wanted, batch)])
    return Samples(images[:count], wanted[:count], losses=tuple(losses))
