"""The objective that IntraQ and LRQ share: class-conditional images, hard and spread out within their class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import (
    Callback,
    batches,
    class_count,
    gaussian,
    optimize_images,
    precision,
    spread_labels,
    variance_distance,
)


@dataclass(frozen=True)
class Hard:
    """The settings of IntraQ's objective; `margin` (radians) is what LRQ adds to the angle to the class centre."""

    batch: int
    target: float  # least confidence that is asked of a hard image (soft inception loss)
    lower: float  # least and greatest cosine distance to the centre of the class (marginal distance constraint)
    upper: float
    crop: float  # least share of the image that a crop keeps (local object reinforcement)
    margin: float = 0.0


def dream_hard(
    network: Network, count: int, hard: Hard, generator: torch.Generator, callback: Callback | None, **how: object
) -> Samples:
    """Batch after batch; the class centres of a batch are those of all images before it, so the first has none."""
    if not 0 < hard.crop <= 1:
        raise OptionError(f"crop is {hard.crop}; it is a share of the image, above 0 and at most 1")
    if not 0 <= hard.target <= 1:
        raise OptionError(f"target is {hard.target}; it is a probability, from 0 to 1")
    if hard.lower > hard.upper:
        raise OptionError(f"lower is {hard.lower} and upper {hard.upper}; no distance is above the one and below the other")
    targets, graph = batch_norms(network), probe(network)
    start = gaussian(network, count, generator)
    classes = class_count(network)
    labels = spread_labels(network, count, generator)
    pieces: list[Tensor] = []
    losses: list[float] = []
    sums, seen_of = start.new_zeros(()), start.new_zeros(classes)
    for piece, told in batches(count, hard.batch, callback):
        images, wanted = start[piece].clone().requires_grad_(), labels[piece]
        easy, share = (torch.rand(len(wanted), generator=generator).to(start.device) for _ in range(2))
        confidence = torch.where(easy < 0.5, 1.0, hard.target + (1 - hard.target) * share)
        known = seen_of[wanted] > 0
        centres = sums[wanted] / seen_of[wanted].clamp(min=1).unsqueeze(1) if known.any() else None

        def loss(
            images: Tensor = images,
            wanted: Tensor = wanted,
            confidence: Tensor = confidence,
            known: Tensor = known,
            centres: Tensor | None = centres,
        ) -> Tensor:
            shown = crop_and_flip(images, hard.crop, generator) if torch.rand((), generator=generator) < 0.5 else images
            with precision(network):
                seen = graph(shown)
            given = seen.scores.float().softmax(1).gather(1, wanted.unsqueeze(1)).squeeze(1)
            total = (given - confidence).square().mean() + variance_distance(seen.features, targets)
            if centres is not None:
                distance = 1 - shifted_cosine(seen.embedding.float()[known], centres[known], hard.margin)
                total = total + (hard.lower - distance).relu().mean() + (distance - hard.upper).relu().mean()
            return total

        losses += optimize_images(images, loss, callback=told, **how)  # type: ignore[arg-type]
        pieces.append(images.detach())
        with torch.no_grad():
            embedding = graph(pieces[-1]).embedding.float()
        sums = sums + embedding.new_zeros(classes, embedding.shape[1]).index_add_(0, wanted, embedding)
        seen_of = seen_of + torch.bincount(wanted, minlength=classes)
    return Samples(torch.cat(pieces), labels, losses=tuple(losses))


def shifted_cosine(features: Tensor, centres: Tensor, margin: float) -> Tensor:
    """cos(theta + margin), theta the angle between each feature and its centre; its gradient is finite at theta = 0 too.

    Where theta + margin leaves 0 to pi, 2 - cos below and -2 - cos above: so that it falls with theta everywhere, and a distance
    made of it rises.
    """
    cosine = F.cosine_similarity(features, centres).clamp(-1 + 1e-6, 1 - 1e-6)
    shifted = cosine * math.cos(margin) - (1 - cosine.square()).sqrt() * math.sin(margin)
    if margin < 0:
        return torch.where(cosine > math.cos(margin), 2 - shifted, shifted)
    return torch.where(cosine < -math.cos(margin), -2 - shifted, shifted)


def crop_and_flip(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """A random part of each image, of `smallest` to all of its area and sides 3:4 to 4:3, at full size; half are mirrored."""
    count = len(images)
    area, shape, right, down, mirrored = torch.rand((5, count), generator=generator).to(images.device)
    area, aspect = smallest + (1 - smallest) * area, ((2 * shape - 1) * math.log(4 / 3)).exp()
    wide = torch.maximum((area * aspect).sqrt().clamp(max=1), area)
    high = area / wide
    matrix = images.new_zeros(count, 2, 3)
    matrix[:, 0, 0] = torch.where(mirrored < 0.5, -wide, wide)
    matrix[:, 1, 1] = high
    matrix[:, 0, 2], matrix[:, 1, 2] = (2 * right - 1) * (1 - wide), (2 * down - 1) * (1 - high)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
