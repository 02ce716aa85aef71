"""A class-conditional generator trained on a network: what GDFQ and LRQ's long-range generator share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import Probed, batch_norms, probe
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

BETAS = (0.5, 0.999)  # of the generator's Adam


class Shown(NamedTuple):
    """A batch of a generator, and what the network shows on it."""

    images: Tensor
    labels: Tensor
    seen: Probed


class ConditionalGenerator:
    """A generator of images of chosen classes, in the input space of the network that it learns from.

    All that is random, its first weights too, comes from `generator`. `conditioning` is how classes steer it: "batchnorm" (GDFQ's
    ImageNet form) or "embedding" (its CIFAR form).
    """

    def __init__(
        self,
        network: Network,
        generator: torch.Generator,
        *,
        attention: bool,
        conditioning: str,
        batch: int,
        latent: int,
        width: int,
    ) -> None:
        if conditioning not in ("batchnorm", "embedding"):
            raise OptionError(f"conditioning is {conditioning!r} (known: batchnorm, embedding)")
        if batch < 2:
            raise OptionError(f"batch is {batch}; the generator's BatchNorms need at least two images")
        self.targets, self.graph = batch_norms(network), probe(network)
        self.classes = class_count(network)
        gaussian(network, network.batch or 1, generator)  # not used: with it, a seed's images stay those of recorded rows
        self.module = initialised(
            ClassGenerator(
                network.input_shape, self.classes, latent, width, by_embedding=conditioning == "embedding", attention=attention
            ),
            generator,
        ).to(network.device)
        self.network, self.generator, self.batch, self.latent = network, generator, batch, latent
        self.mean, self.std = network.input_statistics

    def draw(self, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) of classes (N,)."""
        latents = torch.randn((len(labels), self.latent), generator=self.generator).to(self.mean.device)
        return arranged(self.module(latents, labels).float() * self.std + self.mean)

    def show(self) -> Shown:
        """A batch of random classes, shown to the network; gradients reach the generator."""
        labels = torch.randint(self.classes, (self.batch,), generator=self.generator).to(self.mean.device)
        with precision(self.network):
            images = self.draw(labels)
            return Shown(images, labels, self.graph(images))

    def loss(self, shown: Shown, weight: float, distance: Callable[[list[Tensor]], Tensor] | None = None) -> Tensor:
        """L_G = CE(network(G(z, y)), y) + weight * L_BNS; `distance` of what enters the BatchNorms stands in for L_BNS."""
        statistics = variance_distance(shown.seen.features, self.targets) if distance is None else distance(shown.seen.features)
        return F.cross_entropy(shown.seen.scores.float(), shown.labels) + weight * statistics


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
    maker = ConditionalGenerator(
        network, generator, attention=attention, conditioning=conditioning, batch=batch, latent=latent, width=width
    )
    group = Group(maker.module.parameters(), learning_rate, decay(lambda _: 1.0), betas=BETAS)
    losses = optimize(
        [group], lambda: maker.loss(maker.show(), statistics_weight), steps=steps, tolerance=tolerance, callback=callback
    )
    # whole batches: the generator's BatchNorms see those
    wanted = spread_labels(network, -(-count // batch) * batch, generator)
    with torch.no_grad():
        images = torch.cat([maker.draw(labels) for labels in torch.split(wanted, batch)])
    return Samples(images[:count], wanted[:count], losses=tuple(losses))
