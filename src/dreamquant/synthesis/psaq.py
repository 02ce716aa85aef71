"""PSAQ-ViT's images, whose patches a vision transformer tells apart."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.attention import patch_similarity, probe_attention
from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import (
    Callback,
    Group,
    decay,
    gaussian,
    keep_to_pixels,
    optimize,
    precision,
    spread_labels,
    total_variation,
)

PAPER = "Li et al., Patch Similarity Aware Data-Free Quantization for Vision Transformers (ECCV 2022), arXiv 2203.02250"
NEEDS_BATCHNORM = False
NEEDS_ATTENTION = True
BUDGETS = {"standard": {"steps": 300}, "quick": {"steps": 100}}  # ours: 300 steps measured as good as 1,000

PUBLISHED_COUNT = 32  # images of a batch, whose norms the published weight of the total variation is for


def psaq(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 1000,
    learning_rate: float = 0.2,
    class_weight: float = 1.0,
    variation_weight: float = 0.05,
    variation: float = 1.25,  # that images near, by the root of a batch's values; official: 2,500 to 3,000 for 32 of 3x224x224
    bandwidth: float = 0.0,  # of the density's kernel; 0: Silverman's rule; the official code has 0.01
    points: int = 32,  # at which the density is integrated; the official code has 10
    jitter: float = 0.1,  # images are mirrored, and rolled by up to this part of their size, at each step
) -> Samples:
    """Images whose patches are as unlike one another, behind every attention, as those of photographs.

    Minimises -sum_l H_l + class_weight * L_C + variation_weight * L_TV: H_l is the differential entropy of the similarities of
    an image's patches behind attention l, L_C the cross entropy of a chosen class, L_TV the distance of the total variation
    from `variation`. Weights, jitter, Adam's settings and schedule are the official code's; the paper's own text was not at
    hand. Ours: a bandwidth that follows the similarities, each pair of patches counted once and none with itself, labels
    spread evenly, and L_TV weighed so that neither the number of images nor their size changes it beside L_C.
    """
    if not 0 <= bandwidth < math.inf:
        raise OptionError(f"psaq.bandwidth is {bandwidth}; it must be 0 (Silverman's rule) or above, and finite")
    if points < 2:
        raise OptionError(f"psaq.points is {points}; a density is integrated from at least two points")
    if not 0 <= jitter <= 1:
        raise OptionError(f"psaq.jitter is {jitter}; it is a part of the image, from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    graph, (mean, std) = probe_attention(network), network.input_statistics
    images = gaussian(network, count, generator).requires_grad_()
    labels = spread_labels(network, count, generator) if class_weight else None

    def loss() -> Tensor:
        keep_to_pixels(network, images)
        seen = _jittered(images, jitter, generator)
        with precision(network):
            scores, layers = graph(seen)
        total = -torch.stack([patch_entropy(patches, bandwidth=bandwidth, points=points).mean() for patches in layers]).sum()
        if labels is not None:
            total = total + class_weight * F.cross_entropy(scores.float(), labels)
        excess = total_variation((seen - mean) / std) / math.sqrt(images.numel()) - variation
        return total + variation_weight * math.sqrt(PUBLISHED_COUNT * images[0].numel()) * excess.abs()

    group = Group([images], learning_rate, decay(lambda step: _two_rounds(step, steps)), betas=(0.5, 0.9))
    losses = optimize([group], loss, steps=steps, callback=callback)
    keep_to_pixels(network, images)
    return Samples(images.detach(), labels, losses=tuple(losses))


def patch_entropy(patches: Tensor, *, bandwidth: float = 0.0, points: int = 32) -> Tensor:
    """Differential entropy (rows,) of the similarities of the patches (rows, patches, channels) of each row.

    H = -integral f log f, where f is the density of the similarities estimated by a normal kernel; by the trapezoidal rule.
    """
    similar = patch_similarity(patches.float())
    fixed = similar.detach()
    deviation = fixed.std(-1, keepdim=True).clamp(min=1e-3)  # identical patches have none
    width = 1.06 * deviation * similar.shape[-1] ** -0.2 if bandwidth == 0 else torch.full_like(deviation, bandwidth)
    low, high = fixed.amin(-1, keepdim=True) - 3 * width, fixed.amax(-1, keepdim=True) + 3 * width
    where = low + (high - low) * torch.linspace(0, 1, points, device=low.device)
    kernels = (-0.5 * ((where.unsqueeze(-1) - similar.unsqueeze(1)) / width.unsqueeze(-1)).square()).exp()
    density = kernels.mean(-1) / (width * math.sqrt(2 * math.pi))
    entropy: Tensor = torch.trapezoid(-torch.xlogy(density, density + 1e-6), where)
    return entropy


def _two_rounds(step: int, steps: int) -> float:
    """The learning rate's share: twice a warm-up over a fifth of the round, then a cosine to nothing."""
    length = -(-steps // 2)
    warm, place = max(length // 5, 1), step % length
    return (place + 1) / warm if place < warm else 0.5 + 0.5 * math.cos(math.pi * (place - warm) / max(length - warm, 1))


def _jittered(images: Tensor, part: float, generator: torch.Generator) -> Tensor:
    """The images, mirrored one time in two, rolled along both axes by up to `part` of their size."""
    if part == 0:
        return images
    mirror, *shares = torch.rand(3, generator=generator).tolist()
    shifts = [round((2 * share - 1) * part * size) for share, size in zip(shares, images.shape[2:], strict=True)]
    rolled = images.roll(shifts, (2, 3))
    return rolled.flip(3) if mirror < 0.5 else rolled
