"""Samples in files, whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dreamquant.errors import DataError, OptionError, blamed
from dreamquant.files import atomic_folder, atomic_path, check_output, check_output_folder
from dreamquant.kept import keep, kept
from dreamquant.limits import check_archive
from dreamquant.network.graph import Network
from dreamquant.samples import Samples, are_finite

FORMATS = (".safetensors", ".npz", ".png")
READABLE = (".safetensors", ".npz")
LABELS, SHEET, SETTINGS = "labels.csv", "contact_sheet.png", "samples.json"  # beside the images of a folder
_WRITER = "dreamquant"
_PIXEL_MODES = {1: "L", 3: "RGB"}
_HALF_A_LEVEL = 0.5 / 255  # what rounding to a pixel may change


def save_samples(samples: Samples, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
    """Samples with labels, confidence, losses and the settings that made them, as safetensors."""
    tensors = {"images": samples.images}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    if samples.confidence is not None:
        tensors["confidence"] = samples.confidence
    if samples.losses:
        tensors["losses"] = torch.tensor(samples.losses, dtype=torch.float64)
    keep(path, tensors, _settings(made_by or {"method": samples.method, "seed": samples.seed, "options": samples.options}))


def load_samples(path: Path, made_by: Mapping[str, Any]) -> Samples | None:
    """The samples in `path` if they were made with exactly these settings; None otherwise, or if the file is broken."""
    tensors = kept(path, _settings(made_by))
    return None if tensors is None else _samples(tensors, str(made_by["method"]), int(made_by["seed"]), dict(made_by))


def _settings(made_by: Mapping[str, Any]) -> str:
    return json.dumps(dict(made_by), sort_keys=True)


def _samples(tensors: Mapping[str, Tensor], method: str, seed: int, options: dict[str, Any]) -> Samples:
    losses = tuple(tensors["losses"].tolist()) if "losses" in tensors else ()
    return Samples(tensors["images"], tensors.get("labels"), method, seed, options, losses, tensors.get("confidence"))


# ---- reading what another tool may have touched


def read_samples(path: str | os.PathLike[str]) -> Samples:
    """The samples in a .safetensors or .npz file that `write_samples` wrote.

    An .npz tells neither method nor seed. One with a single array, as ModelOpt takes it, holds the images, whatever their
    name. Raises DataError when the file is missing, damaged, of another kind, or when what it holds does not fit together.
    """
    place = Path(path)
    if place.suffix not in READABLE:
        raise DataError(f"{place} holds no samples that can be read (known: {', '.join(READABLE)})")
    if not place.is_file():
        raise DataError(f"there is no file {place}")
    with blamed(DataError, f"{place} is not a readable {place.suffix} file"):
        tensors, made_by = _read_npz(place) if place.suffix == ".npz" else _read_safetensors(place)
        _check_tensors(tensors, place)
        return _samples(tensors, *made_by)


_MadeBy = tuple[str, int, dict[str, Any]]  # method, seed, options


def _read_npz(path: Path) -> tuple[dict[str, Tensor], _MadeBy]:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        check_archive(file.zip, file.zip.namelist(), str(path), DataError)
        arrays = {name: file[name] for name in file.files}
    if "images" not in arrays and len(arrays) == 1:
        arrays = {"images": next(iter(arrays.values()))}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, ("", 0, {})


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], _MadeBy]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        settings = json.loads((file.metadata() or {}).get("made_by", "{}"))
    return tensors, (str(settings.get("method", "")), int(settings.get("seed", 0)), dict(settings.get("options", {})))


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    if "images" not in tensors:
        raise DataError(f"{path} has no array 'images' (it has: {', '.join(sorted(tensors)) or 'none'})")
    images = tensors["images"]
    kind = str(images.dtype).removeprefix("torch.")
    if images.dim() != 4 or images.dtype != torch.float32 or images.numel() == 0:
        raise DataError(f"the images in {path} are {kind} {tuple(images.shape)}, not float32 (N, C, H, W) with at least one")
    if not are_finite(images):
        raise DataError(f"the images in {path} have values that are NaN or infinite")
    for name in ("labels", "confidence"):
        if name in tensors and tensors[name].shape != images.shape[:1]:
            raise DataError(f"{path} has {len(images)} images and {name} of shape {tuple(tensors[name].shape)}")


# ---- writing for other eyes


def write_samples(samples: Samples, network: Network, path: str | os.PathLike[str], *, input_name: str = "") -> None:
    """Samples for other eyes, in the format that the suffix of `path` tells.

    .safetensors holds everything that `Samples` does; .npz images, labels and confidence; .png is a sheet of all images, as
    pixels. Without a suffix it is a folder: one PNG an image, `labels.csv` (file, and label and confidence where they are
    known), `contact_sheet.png`, and `samples.json` (method, seed, options, losses). With an `input_name`, an .npz holds the
    images under that name and nothing else, as NVIDIA ModelOpt reads it.

    Raises what `check_samples_path` and `check_pixels` do.
    """
    path = Path(path)
    check_samples_path(path, named=bool(input_name))
    if not path.suffix:
        _write_folder(samples, network, path)
    elif path.suffix == ".safetensors":
        save_samples(samples, path)
    elif path.suffix == ".npz":
        _write_npz(samples, path, input_name)
    else:
        with atomic_path(path) as temporary:
            contact_sheet(samples, network).save(temporary, format="PNG")


def check_samples_path(path: Path, *, inputs: Iterable[Path] = (), named: bool = False) -> None:
    """Raise OptionError when `write_samples` does not know the format that `path` asks for, or could not store images under
    a model's input name in it (`named`); OutputError when the file or folder could not be written."""
    if path.suffix and path.suffix not in FORMATS:
        known = f"known: {', '.join(FORMATS)}, and no suffix for a folder"
        raise OptionError(f"the output is {path}; its suffix must tell the format ({known})")
    if named and path.suffix != ".npz":
        raise OptionError(f"the output is {path}; images under the name of a model's input are stored in an .npz only")
    if path.suffix:
        check_output(path, inputs=inputs)
    else:
        check_output_folder(path, foreign=_foreign)


def check_pixels(network: Network) -> None:
    """Raise OptionError when the images of `network` cannot be written as pixels, one file an image."""
    if not network.mean:
        raise OptionError(
            f"a folder of pixels needs mean and std, which {network.source.text} does not store: give both"
            " (or write .npz or .safetensors, which keep the numbers as they are)"
        )
    if network.input_shape[0] not in _PIXEL_MODES:
        raise OptionError(
            f"a folder of pixels holds images of 1 or 3 channels, and {network.source.text} takes {network.input_shape[0]}"
            " (write .npz or .safetensors)"
        )


def _write_npz(samples: Samples, path: Path, input_name: str) -> None:
    """`np.savez`, for arrays of any name."""
    arrays: dict[str, Tensor | None] = {input_name or "images": samples.images}
    if not input_name:
        arrays |= {"labels": samples.labels, "confidence": samples.confidence}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, tensor in arrays.items():
            if tensor is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, tensor.numpy(), allow_pickle=False)


def _write_folder(samples: Samples, network: Network, path: Path) -> None:
    check_pixels(network)
    values = _unit_range(samples.images, network)
    pixels = _pixels(values).permute(0, 2, 3, 1).numpy()
    clipped = ((values - 0.5).abs() > 0.5 + _HALF_A_LEVEL).float().mean().item()
    settings = {
        "written_by": _WRITER,
        "method": samples.method,
        "seed": samples.seed,
        "options": samples.options,
        "losses": samples.losses,
        "mean": network.mean,
        "std": network.std,
        "clipped": clipped,  # share of the values that no pixel can hold
    }
    columns: dict[str, list[Any]] = {"file": [f"{index:05d}.png" for index in range(len(samples))]}
    if samples.labels is not None:
        columns["label"] = samples.labels.tolist()
    if samples.confidence is not None:
        columns["confidence"] = [f"{value:.6f}" for value in samples.confidence.tolist()]
    with atomic_folder(path) as folder:
        for name, image in zip(columns["file"], pixels, strict=True):
            _image(image).save(folder / name, format="PNG")
        with (folder / LABELS).open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        contact_sheet(samples, network).save(folder / SHEET, format="PNG")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _foreign(folder: Path) -> str:
    """The name of something in a folder that `_write_folder` does not write; "" if there is nothing."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if not path.is_file() or not (path.name in (LABELS, SHEET, SETTINGS) or re.fullmatch(r"\d{5,}\.png", path.name)):
            return path.name
    return paths[0].name if paths and not _is_ours(folder / SETTINGS) else ""


def _is_ours(settings: Path) -> bool:
    try:
        found = json.loads(settings.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("written_by") == _WRITER


def _unit_range(images: Tensor, network: Network) -> Tensor:
    """Images with the network's normalisation undone: a pixel is in 0..1."""
    shape = (-1, 1, 1)
    return images * torch.tensor(network.std).view(shape) + torch.tensor(network.mean).view(shape)


def _pixels(values: Tensor) -> Tensor:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    """A grey or RGB image from (H, W, 1) or (H, W, 3)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def visible_pixels(samples: Samples, network: Network) -> Tensor:
    """All images as pixels, uint8 (N, 3, H, W): with the network's normalisation undone, or scaled to their own range.

    Of images that have neither one channel nor three, the first channel is shown.
    """
    images = samples.images
    if network.mean:
        images = _unit_range(images, network)
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    pixels = _pixels(images)
    return pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def contact_sheet(samples: Samples, network: Network, *, columns: int = 8) -> Image.Image:
    """All images side by side, as `visible_pixels` shows them."""
    pixels = visible_pixels(samples, network)
    height, width = pixels.shape[2:]
    sheet = torch.full((-(-len(pixels) // columns) * (height + 2), columns * (width + 2), 3), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        sheet[row * (height + 2) : row * (height + 2) + height, column * (width + 2) : column * (width + 2) + width] = (
            image.permute(1, 2, 0)
        )
    return Image.fromarray(sheet.numpy())
