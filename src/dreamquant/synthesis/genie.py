"""Genie's distilled data: a small generator and its latent vectors, learned together for each batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.samples import Samples
from dreamquant.synthesis._generators import LatentGenerator, initialised
from dreamquant.synthesis._loop import Callback, Group, arranged, batches, decay, input_distance, optimize, plateau, precision

PAPER = "Jeon et al., Genie: Show Me the Data for Quantization (CVPR 2023), arXiv 2212.04780"
NEEDS_BATCHNORM = True
BUDGETS = {"standard": {"steps": 400}, "quick": {"steps": 100}}  # ours: a tenth of the published steps, and a fortieth


def genie(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    steps: int = 4000,
    batch: int = 128,
    latent_rate: float = 0.1,  # the released code swaps these two names; the values are those that act
    generator_rate: float = 0.01,
    patience: int = 100,
    decay_every: int = 100,
    latent: int = 256,
    width: int = 128,
    swing: bool = True,
    tolerance: float = 0.0,
) -> Samples:
    """Images from a fresh generator and learned latent vectors for each batch, under swing convolution.

    L = |mean(x)|^2 + |1 - std(x)|^2 of each image + sum_l (|mu_l - mean_l|^2 + |sigma_l - std_l|^2) / C_l of the batch. The
    images kept are those of the last step. Swing convolution: what enters a strided convolution is padded by one reflected pixel
    and cut back at a random offset.
    """
    if decay_every < 1:
        raise OptionError(f"genie.decay_every is {decay_every}; at least one step is needed")
    if max(network.input_shape[1:]) <= 4 and min(batch, count) < 2:
        raise OptionError("genie's BatchNorms see one value of one image of at most 4x4 pixels; at least two images are needed")
    generator = torch.Generator().manual_seed(seed)
    targets = batch_norms(network)
    graph = probe(network, before_stride=(lambda x: _swing(x, generator)) if swing else None)
    mean, std = network.input_statistics
    pieces: list[Tensor] = []
    losses: list[float] = []
    for piece, told in batches(count, batch, callback):
        latents = torch.randn((piece.stop - piece.start, latent), generator=generator).to(mean.device).requires_grad_()
        maker = initialised(LatentGenerator(network.input_shape, latent, width), generator).to(mean.device)

        def loss(latents: Tensor = latents, maker: torch.nn.Module = maker) -> Tensor:
            with precision(network):
                images = maker(latents).float() * std + mean
                seen = graph(arranged(images))
            total = input_distance(network, images, per_sample=True)
            for feature, target in zip(seen.features, targets, strict=True):
                actual_mean, actual_std = moments(feature, per_sample=False)
                total = total + F.mse_loss(actual_mean, target.mean) + F.mse_loss(actual_std, target.std)
            return total

        groups = [
            Group([latents], latent_rate, plateau(patience)),
            Group(maker.parameters(), generator_rate, decay(lambda step: 0.95 ** (step // decay_every))),
        ]
        losses += optimize(groups, loss, steps=steps, tolerance=tolerance, window=2 * patience, callback=told)
        with torch.no_grad():
            pieces.append(maker(latents).float() * std + mean)
    return Samples(torch.cat(pieces), losses=tuple(losses))


def _swing(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        return x  # no image, or nothing to reflect
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(x, (1, 1, 1, 1), mode="reflect")[..., down : down + x.shape[2], right : right + x.shape[3]]
