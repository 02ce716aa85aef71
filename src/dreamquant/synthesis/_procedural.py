"""Procedural images with the statistics of photographs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import OptionError
from dreamquant.mapped import Pieces, room
from dreamquant.network.graph import Network
from dreamquant.network.input_evidence import one_over_f
from dreamquant.synthesis._loop import Callback, arranged, keep_to_pixels


def procedural(
    network: Network,
    count: int,
    generator: torch.Generator,
    *,
    leaves: int = 200,
    texture: float = 0.3,
    chroma: float = 0.35,
    callback: Callback | None = None,
) -> Tensor:
    """Dead leaves under 1/f texture (N, C, H, W), as `fractal` describes them; in the processor's memory."""
    channels, height, width = network.input_shape
    mean, std = network.space.statistics(channels)
    images, sums = room((count, channels, height, width)), torch.zeros(2, channels, 1, 1, dtype=torch.float64, device=CPU)
    for index in range(count):
        image = _dead_leaves(channels, height, width, leaves, chroma, generator)
        image += texture * one_over_f(height, width, generator) * torch.rand((), generator=generator)
        contrast = 0.75 + 0.5 * torch.rand((), generator=generator)
        image = image * contrast + 0.25 * torch.randn((), generator=generator)
        images[index] = image
        sums += torch.stack([part.sum((1, 2), keepdim=True) for part in (image.double(), image.double().square())])
        if callback is not None:
            callback(index + 1, count, 0.0)
    pixels = count * height * width
    centre, square = sums / pixels
    spread = ((square - centre.square()) * (pixels / max(pixels - 1, 1))).clamp(min=0).sqrt().float()
    for piece in Pieces(images, 1):
        piece.sub_(centre.float()).div_(spread.clamp(min=1e-6)).mul_(std).add_(mean)
        keep_to_pixels(network, piece)
    return images


def first_images(network: Network, count: int, generator: torch.Generator, start: str, published: Callable[[], Tensor]) -> Tensor:
    """Where an optimisation starts: `published`, as the paper does, or `procedural`, much nearer to what networks know."""
    if start not in ("published", "procedural"):
        raise OptionError(f"start is {start!r} (known: published, procedural)")
    images = published() if start == "published" else procedural(network, count, generator)
    return arranged(images.to(network.device)).requires_grad_()


def _dead_leaves(channels: int, height: int, width: int, leaves: int, chroma: float, generator: torch.Generator) -> Tensor:
    """An image (C, H, W) of discs, later ones in front; radii follow r^-3 from a pixel to the image's size."""
    size = float(max(height, width))
    rows, columns = torch.arange(height, device=CPU).view(-1, 1), torch.arange(width, device=CPU)
    smallest, largest = max(1.0, 0.03 * size), size
    ground = torch.randn((), generator=generator).expand(1, channels)
    uniform = torch.rand((leaves, 3), generator=generator)
    # inverse of the cumulative distribution of r^-3 on [smallest, largest]
    radii = (smallest**-2 - uniform[:, 0] * (smallest**-2 - largest**-2)) ** -0.5
    colours = torch.randn((leaves, 1), generator=generator) + chroma * torch.randn((leaves, channels), generator=generator)
    front = torch.zeros(height, width, dtype=torch.int64, device=CPU)  # the leaf that is seen; 0 is the ground
    places = zip(radii.tolist(), (uniform[:, 1] * height).tolist(), (uniform[:, 2] * width).tolist(), strict=True)
    for number, (radius, down, right) in enumerate(places, 1):
        across, along = (slice(max(0, int(middle - radius)), int(middle + radius) + 2) for middle in (down, right))
        inside = (rows[across] - down) ** 2 + (columns[along] - right) ** 2 < radius**2
        front[across, along].masked_fill_(inside, number)
    return torch.cat([ground, colours])[front].movedim(2, 0)
