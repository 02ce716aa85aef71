"""More images of few: what learning needs is variety, and dreaming is what takes the time."""

from __future__ import annotations

from dataclasses import replace

import torch

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._procedural import procedural

WIDENED = 4  # times as many images
APART = 0x77696465  # added to the seed, so that the procedural images are not those that dreams begin from


def widened(network: Network, samples: Samples) -> Samples:
    """Four images for one: the samples, their mirror images, and as many procedural images (see `fractal`) as both together.

    Dreams show a network what its classes look like to it, but are alike; procedural images are unlike one another and show no
    class. Rounding learnt on both keeps more than on either.
    """
    dreamt = torch.cat([samples.images, samples.images.flip(3)])
    generator = torch.Generator().manual_seed((samples.seed + APART) % 2**63)
    images = torch.cat([dreamt, procedural(network, len(dreamt), generator)])
    return replace(samples, images=images, labels=None, confidence=None)
