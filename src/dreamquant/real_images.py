"""Images that a user may use: they calibrate, and some of them are held out to measure on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from dreamquant.assess.labelled import load_labelled
from dreamquant.errors import DataError
from dreamquant.network.graph import Network
from dreamquant.samples import REAL, Samples
from dreamquant.storage import READABLE, read_samples

FEWEST = 2  # one to calibrate on, one to measure on
SHARE = 4  # one of so many is held out


def real_images(
    network: Network, path: str | os.PathLike[str], *, resize: str = "cover", seed: int = 0, most_held_out: int = 128
) -> tuple[Samples, Samples]:
    """Images to calibrate on and images to measure on: of every four one, but no more than `most_held_out`, drawn by `seed`.

    `path` is a folder, a .zip or an .npz of images as `load_labelled` takes them, without labels, or a file that `synthesize`
    wrote, whose numbers are as the network is fed them. Raises `DataError` for images that cannot be read or are fewer than two,
    and where it is not known how the network's pixels are fed.
    """
    place = Path(path)
    given = _samples(network, place, resize)
    if len(given) < FEWEST:
        raise DataError(f"{place} holds {len(given)} images; one to calibrate on and one to measure on are needed")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, min(len(given) // SHARE, most_held_out))
    options = {"path": str(place), "resize": resize}
    chosen = order[held_out:], order[:held_out]
    calibration, rest = (Samples(given[indices], method=REAL, seed=seed, options=options) for indices in chosen)
    return calibration, rest


def _samples(network: Network, place: Path, resize: str) -> torch.Tensor:
    if place.suffix in READABLE and not _holds_pixels(place):
        samples = read_samples(place)
        samples.check(network.input_shape)
        return samples.images
    data = load_labelled(place, required=False, resize=resize)
    space = network.space
    if not space.mean:
        raise DataError(
            f"{network.source.text} takes {space.numbers()}, and it is not known how pixels become such numbers: state it, with"
            " --mean and --std or --pixels, so that images can be fed to it"
        )
    batches = data.batches(len(data), input_shape=network.input_shape, mean=space.mean, std=space.std, channels=space.channels)
    return space.snapped(torch.from_numpy(np.ascontiguousarray(next(iter(batches))[0])))


def _holds_pixels(place: Path) -> bool:
    """Whether an .npz is one of pixels, `x`, and not one of samples; a file that cannot be read is left to who reads it."""
    if place.suffix != ".npz" or not place.is_file():
        return False
    try:
        with place.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return "x" in file.files
    except Exception:  # whatever the broken bytes lead to
        return False
