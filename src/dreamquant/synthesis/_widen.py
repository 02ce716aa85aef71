"""More images of few: what learning needs is variety, and dreaming is what takes the time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._procedural import procedural

WIDENED = 4  # times as many images
APART = 0x77696465  # added to the seed, so that the procedural images are not those that dreams begin from
SMALLEST, LARGEST = 0.45, 0.85  # of an image's sides, what a dream takes of a scene


def widened(network: Network, samples: Samples) -> Samples:
    """Four images for one: the samples, their mirror images, and as many scenes as both together.

    A scene is a procedural image (see `fractal`) with a piece of a sample, or a smaller copy of its mirror image, somewhere on
    it. Dreams show a network what its classes look like to it, but are alike; procedural images are unlike one another and show
    no class. Rounding learnt on images that show both keeps more than on either.
    """
    mirrored = samples.images.flip(3)
    generator = torch.Generator().manual_seed((samples.seed + APART) % 2**63)
    grounds = procedural(network, 2 * len(samples), generator)
    for ground, image in zip(grounds[: len(samples)], samples.images, strict=True):
        _put(ground, image, generator, whole=False)
    for ground, image in zip(grounds[len(samples) :], mirrored, strict=True):
        _put(ground, image, generator, whole=True)
    images = network.space.snapped(torch.cat([samples.images, mirrored, grounds]))
    return replace(samples, images=images, labels=None, confidence=None)


def _put(ground: Tensor, image: Tensor, generator: torch.Generator, *, whole: bool) -> None:
    """Put part of an image (C, H, W), or the whole of it made smaller, somewhere on `ground`, in place."""
    share, *places = torch.rand(5, generator=generator).tolist()
    share = SMALLEST + (LARGEST - SMALLEST) * share
    sides = [max(1, int(share * side)) for side in image.shape[1:]]
    room = [side - taken + 1 for side, taken in zip(image.shape[1:], sides, strict=True)]
    (top, left), (down, right) = (
        [int(place * free) for place, free in zip(pair, room, strict=True)] for pair in (places[:2], places[2:])
    )
    height, width = sides
    if whole:
        part = F.interpolate(image.unsqueeze(0), size=(height, width), mode="bilinear", antialias=True)[0]
    else:
        part = image[:, top : top + height, left : left + width]
    ground[:, down : down + height, right : right + width] = part
