"""Samples come back from files as they were, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.storage import contact_sheet, load_samples, save_samples, write_samples

MADE_BY: dict[str, Any] = {"method": "mine", "count": 3, "seed": 7, "options": {"steps": 5, "rate": 0.1}}


@pytest.fixture
def samples(residual: Network) -> Samples:
    images = torch.randn(3, *residual.input_shape, generator=torch.Generator().manual_seed(0))
    return Samples(images, torch.tensor([2, 0, 1]), method="mine", seed=7, losses=(3.5, 1 / 3))


def test_samples_come_back_as_they_were(samples: Samples, tmp_path: Path) -> None:
    save_samples(samples, tmp_path / "s.safetensors", MADE_BY)
    again = load_samples(tmp_path / "s.safetensors", MADE_BY)

    assert again is not None
    assert torch.equal(again.images, samples.images)
    assert again.labels is not None
    assert samples.labels is not None
    assert torch.equal(again.labels, samples.labels)
    assert (again.method, again.seed, again.losses, again.options) == ("mine", 7, samples.losses, MADE_BY)


def test_what_was_not_there_is_not_there_again(samples: Samples, tmp_path: Path) -> None:
    bare = replace(samples, labels=None, losses=(), images=samples.images.contiguous(memory_format=torch.channels_last))
    save_samples(bare, tmp_path / "s.safetensors", MADE_BY)
    again = load_samples(tmp_path / "s.safetensors", MADE_BY)

    assert again is not None
    assert again.labels is None
    assert again.losses == ()
    assert torch.equal(again.images, bare.images)


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"count": 4}, {"method": "yours"}, {"options": {"steps": 5, "rate": 0.2}}, {"more": 1}]
)
def test_other_settings_find_nothing(samples: Samples, tmp_path: Path, change: dict[str, Any]) -> None:
    save_samples(samples, tmp_path / "s.safetensors", MADE_BY)

    assert load_samples(tmp_path / "s.safetensors", MADE_BY | change) is None


def test_the_order_of_settings_does_not_matter(samples: Samples, tmp_path: Path) -> None:
    save_samples(samples, tmp_path / "s.safetensors", MADE_BY)

    assert load_samples(tmp_path / "s.safetensors", dict(reversed(MADE_BY.items()))) is not None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_none(samples: Samples, tmp_path: Path, share: float) -> None:
    path = tmp_path / "s.safetensors"
    save_samples(samples, path, MADE_BY)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])

    assert load_samples(path, MADE_BY) is None


def test_a_missing_or_foreign_file_is_none(tmp_path: Path) -> None:
    assert load_samples(tmp_path / "absent", MADE_BY) is None
    (tmp_path / "text").write_text("hello, this is no such file, but it is long enough")
    assert load_samples(tmp_path / "text", MADE_BY) is None


def test_npz_holds_images_and_labels(samples: Samples, residual: Network, tmp_path: Path) -> None:
    write_samples(samples, residual, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["images", "labels"]
        assert np.array_equal(file["images"], samples.images.numpy())
        assert file["labels"].tolist() == [2, 0, 1]
    write_samples(replace(samples, labels=None), residual, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["images"]


def test_safetensors_can_be_read_by_others(samples: Samples, residual: Network, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_samples(samples, residual, tmp_path / "s.safetensors")
    assert torch.equal(load_file(tmp_path / "s.safetensors")["images"], samples.images)


def test_a_sheet_shows_every_image_as_the_pixels_it_stands_for(samples: Samples, residual: Network) -> None:
    network = replace(residual, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    sheet = np.asarray(contact_sheet(samples, network, columns=2)).astype(int)
    shape = (-1, 1, 1)
    pixels = samples.images * torch.tensor(network.std).view(shape) + torch.tensor(network.mean).view(shape)
    third = (pixels[2].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()

    assert sheet.shape == (2 * 13, 2 * 11, 3)
    assert np.array_equal(sheet[13:24, :9], third)
    assert (sheet[13:, 11:] == 255).all()  # no fourth image


def test_a_sheet_without_normalisation_uses_the_whole_range(samples: Samples, residual: Network, tmp_path: Path) -> None:
    grey = replace(samples, images=samples.images[:, :1])
    write_samples(grey, residual, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        sheet = np.asarray(image)

    assert sheet.shape == (13, 8 * 11, 3)
    assert sheet[:11, :9].min() == 0
    assert sheet[:11, :9].max() == 255
    assert np.array_equal(sheet[..., 0], sheet[..., 2])


@pytest.mark.parametrize("name", ["s.jpg", "s", "s.onnx"])
def test_another_suffix_is_refused(samples: Samples, residual: Network, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"known: \.safetensors, \.npz, \.png"):
        write_samples(samples, residual, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
