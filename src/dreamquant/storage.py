"""Samples in files, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dreamquant.errors import OptionError
from dreamquant.files import atomic_path, atomic_write
from dreamquant.network.graph import Network
from dreamquant.samples import Samples

FORMATS = (".safetensors", ".npz", ".png")


def save_samples(samples: Samples, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
    """Samples with labels, losses and the settings that made them, as safetensors."""
    tensors = {"images": samples.images.contiguous()}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    if samples.losses:
        tensors["losses"] = torch.tensor(samples.losses, dtype=torch.float64)
    settings = dict(made_by or {"method": samples.method, "seed": samples.seed})
    atomic_write(path, save(tensors, {"made_by": json.dumps(settings, sort_keys=True)}))


def load_samples(path: Path, made_by: Mapping[str, Any]) -> Samples | None:
    """The samples in `path` if they were made with exactly these settings; None otherwise, or if the file is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_by") != json.dumps(dict(made_by), sort_keys=True):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None
    losses = tuple(tensors["losses"].tolist()) if "losses" in tensors else ()
    return Samples(tensors["images"], tensors.get("labels"), str(made_by["method"]), int(made_by["seed"]), dict(made_by), losses)


def write_samples(samples: Samples, network: Network, path: Path) -> None:
    """Samples for other eyes: .safetensors, .npz (images, labels) or .png (a sheet of all images, as pixels)."""
    if path.suffix == ".safetensors":
        save_samples(samples, path)
    elif path.suffix == ".npz":
        arrays = {
            "images": samples.images.numpy(),
            **({} if samples.labels is None else {"labels": samples.labels.numpy()}),
        }
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".png":
        with atomic_path(path) as temporary:
            contact_sheet(samples, network).save(temporary, format="PNG")
    else:
        raise OptionError(f"the output is {path}; its suffix must tell the format (known: {', '.join(FORMATS)})")


def contact_sheet(samples: Samples, network: Network, *, columns: int = 8) -> Image.Image:
    """All images side by side as pixels: with the network's normalisation undone, or scaled to their own range."""
    images = samples.images
    if network.mean:
        shape = (-1, 1, 1)
        images = images * torch.tensor(network.std).view(shape) + torch.tensor(network.mean).view(shape)
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.shape[1] != 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    height, width = pixels.shape[2:]
    sheet = torch.full((-(-len(pixels) // columns) * (height + 2), columns * (width + 2), 3), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        sheet[row * (height + 2) : row * (height + 2) + height, column * (width + 2) : column * (width + 2) + width] = (
            image.permute(1, 2, 0)
        )
    return Image.fromarray(sheet.numpy())
