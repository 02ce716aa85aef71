"""Procedural images with the statistics of photographs; no network is asked."""

import torch

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import Callback
from dreamquant.synthesis._procedural import procedural

PAPER = "Lee et al., Occlusion Models for Natural Images (IJCV 2001); Field, 1/f spectra of natural images (JOSA A 1987)"
NEEDS_BATCHNORM = False
MADE_APART = True  # each image, and no more than one is in memory


def fractal(
    network: Network,
    count: int,
    *,
    seed: int = 0,
    callback: Callback | None = None,
    leaves: int = 200,
    texture: float = 0.3,  # deviation of the 1/f texture on the leaves, of which each has its own share
    chroma: float = 0.35,  # deviation of a leaf's colour channels around its brightness, which has deviation 1
) -> Samples:
    """Dead leaves: discs with density r^-3 that hide one another, each of one colour, under 1/f texture.

    Occluding objects of all sizes give photographs their edges, flat areas and power spectrum; a calibration image needs little
    more. Images differ in brightness and contrast, have the mean and deviation of the input space as a set, and keep to its
    range where the network's normalisation is known.
    """
    if leaves < 1:
        raise OptionError(f"leaves is {leaves}; at least one leaf is needed")
    images = procedural(
        network,
        count,
        torch.Generator().manual_seed(seed),
        leaves=leaves,
        texture=texture,
        chroma=chroma,
        callback=callback,
    )
    return Samples(images)
