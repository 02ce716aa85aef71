"""Generators that methods train to dream: latent vectors -> images in the network's input space."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.devices import CPU
from dreamquant.errors import OptionError

M = TypeVar("M", bound=nn.Module)


def initialised(module: M, generator: torch.Generator) -> M:
    """The module, in the processor's memory, with torch's own initial weights, drawn from `generator`."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, a=5**0.5, generator=generator)
            if part.bias is not None:
                bound = part.weight[0].numel() ** -0.5
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, generator=generator)
    return module


def bare(kind: type[M], *arguments: Any, **options: Any) -> M:
    """A layer whose weights are not drawn yet: torch draws from its global generator."""
    layer: M = nn.utils.skip_init(kind, *arguments, **options)  # type: ignore[no-untyped-call]
    return layer


class Growing(nn.Module):
    """What all generators here do: a linear layer to a quarter of the image's size, then twice up to the image."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        if min(latent, width) < 1:
            raise OptionError(f"latent is {latent} and width is {width}; both must be at least 1")
        channels, height, width_of_image = shape
        sizes = [(-(-height // part), -(-width_of_image // part)) for part in (4, 2, 1)]
        self.first, *self.sizes = sizes
        self.width = width
        self.grow = bare(nn.Linear, latent, width * self.first[0] * self.first[1])
        self.finish = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(channels, affine=False))

    def start(self, latents: Tensor) -> Tensor:
        """(N, latent) -> (N, width, H/4, W/4)."""
        grown: Tensor = self.grow(latents).reshape(len(latents), self.width, *self.first)
        return grown

    def up(self, x: Tensor, stage: int) -> Tensor:
        """To the next size; twice as large but for rounding."""
        return F.interpolate(x, size=self.sizes[stage], mode="nearest")


def conv(inputs: int, outputs: int, kernel: int = 3, *, dilation: int = 1, depthwise: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, its weights not yet drawn."""
    padding = dilation * (kernel // 2)
    groups = inputs if depthwise else 1
    return bare(nn.Conv2d, inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups)


class LatentGenerator(Growing):
    """Genie's: two blocks of upsampling and convolution under BatchNorm and LeakyReLU."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__(shape, latent, width)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(max(width // 2, 1))])
        self.convs = nn.ModuleList([conv(width, max(width // 2, 1)), conv(max(width // 2, 1), shape[0])])

    def forward(self, latents: Tensor) -> Tensor:
        x = self.norms[0](self.start(latents))
        x = F.leaky_relu(self.norms[1](self.convs[0](self.up(x, 0))), 0.2)
        images: Tensor = self.finish(self.convs[1](self.up(x, 1)))
        return images


class ClassGenerator(Growing):
    """GDFQ's: classes steer it, through the BatchNorms' scales and shifts (its ImageNet form) or by an embedding that the latent
    vector is multiplied with (its CIFAR form). `attention` puts the long-range block of LRQ behind the first convolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        latent: int,
        width: int,
        *,
        by_embedding: bool = False,
        attention: bool = False,
        epsilon: float = 0.8,  # the official code passes 0.8 where BatchNorm expects its epsilon
    ) -> None:
        super().__init__(shape, latent, width)
        widths = [width, width, max(width // 2, 1)]
        given = 1 if by_embedding else classes
        self.embedding = bare(nn.Embedding, classes, latent) if by_embedding else None
        self.norms = nn.ModuleList([ConditionalNorm(channels, given, epsilon) for channels in widths])
        self.convs = nn.ModuleList([conv(before, after) for before, after in pairwise([*widths, shape[0]])])
        self.attention = LongRange(width) if attention else None

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            latents, labels = latents * self.embedding(labels), torch.zeros_like(labels)
        x = self.norms[0](self.start(latents), labels)
        x = F.leaky_relu(self.norms[1](self.convs[0](self.up(x, 0)), labels), 0.2)
        if self.attention is not None:
            x = self.attention(x)
        x = F.leaky_relu(self.norms[2](self.convs[1](self.up(x, 1)), labels), 0.2)
        images: Tensor = self.finish(self.convs[2](x))
        return images


class ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift each class learns: from 1 and 0."""

    def __init__(self, channels: int, classes: int, epsilon: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=epsilon, affine=False)
        self.scale = nn.Parameter(torch.ones(classes, channels, device=CPU))
        self.shift = nn.Parameter(torch.zeros(classes, channels, device=CPU))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        normal: Tensor = self.norm(x)
        return normal * self.scale[labels][..., None, None] + self.shift[labels][..., None, None]


class LongRange(nn.Module):
    """Attention of large kernels (LRQ): out = 1x1(u * 1x1(DW 7x7 dilation 3(DW 5x5(u)))) + x, u = GELU(1x1(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(width, width, 1), conv(width, width, 1)
        self.attend = nn.Sequential(
            conv(width, width, 5, depthwise=True), conv(width, width, 7, dilation=3, depthwise=True), conv(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.enter(x))
        out: Tensor = self.leave(u * self.attend(u)) + x
        return out
