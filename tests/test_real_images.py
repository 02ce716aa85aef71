"""Images that a user may use: calibration on them, some held out, and how they come to the network's size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dreamquant
from dreamquant.assess.labelled import load_labelled
from dreamquant.errors import DataError, OptionError
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels, standard
from dreamquant.real_images import real_images
from dreamquant.samples import Samples
from dreamquant.storage import write_samples

SHAPE = (3, 11, 9)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Nine images of different sizes and colours in a folder."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for index in range(9):
        pixels = drawn.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def network(residual: Network) -> Network:
    return replace(residual, space=of_pixels((0.5,) * 3, (0.25,) * 3))


def test_some_are_held_out_and_none_is_in_both(network: Network, photographs: Path) -> None:
    calibration, held_out = real_images(network, photographs)

    assert (len(calibration), len(held_out)) == (7, 2)
    assert calibration.method == "images"
    both = torch.cat([calibration.images, held_out.images])
    assert both.shape == (9, *SHAPE)
    assert len(both.unique(dim=0)) == 9
    assert both.abs().max() <= 2  # (p - 0.5) / 0.25 of pixels in 0..1
    again, _ = real_images(network, photographs)
    other, _ = real_images(network, photographs, seed=1)
    assert torch.equal(again.images, calibration.images)
    assert not torch.equal(other.images, calibration.images)


def test_pixels_of_an_npz_need_no_labels_and_samples_are_taken_as_they_are(network: Network, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 11, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", x=pixels)
    calibration, held_out = real_images(network, tmp_path / "pixels.npz")
    assert (len(calibration), len(held_out)) == (6, 2)

    samples = Samples(torch.randn(5, *SHAPE))
    write_samples(samples, network, tmp_path / "samples.npz")
    parts = real_images(network, tmp_path / "samples.npz")
    assert sorted(one.sum().item() for part in parts for one in part.images) == sorted(one.sum().item() for one in samples.images)


def test_blue_comes_first_where_it_must(network: Network, photographs: Path) -> None:
    rgb, _ = real_images(network, photographs)
    bgr, _ = real_images(replace(network, space=replace(network.space, channels="bgr")), photographs)

    assert torch.equal(bgr.images, rgb.images.flip(1))


def test_what_cannot_be_used_is_refused(network: Network, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not known how pixels become such numbers"):
        real_images(replace(network, space=standard(3)), photographs)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 11)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="holds 1 images"):
        real_images(network, tmp_path / "one")
    with pytest.raises(DataError, match="does not exist"):
        real_images(network, tmp_path / "nowhere")
    with pytest.raises(OptionError, match=r"unknown resize 'zoom'.*256"):
        real_images(network, photographs, resize="zoom")


def test_a_run_calibrates_on_them_alone_or_with_synthetic_ones(
    residual_module: nn.Module, photographs: Path, tmp_path: Path
) -> None:
    said = {"input_shape": SHAPE, "mean": (0.5,) * 3, "std": (0.25,) * 3, "images": photographs, "force": True}
    alone = dreamquant.run(residual_module, tmp_path / "a.onnx", **said)
    mixed = dreamquant.run(residual_module, tmp_path / "b.onnx", mix=True, settings=["synthesis.count=8"], **said)

    assert (len(alone.samples), alone.assessment.agreement.samples, alone.samples.method) == (7, 2, "images")
    assert (len(mixed.samples), mixed.samples.method) == (15, "images and fractal")
    assert alone.assessment.trust is None
    assert alone.summary()["calibration"] == {"method": "images", "images": 7}
    with pytest.raises(OptionError, match="mix is set"):
        dreamquant.run(residual_module, tmp_path / "c.onnx", input_shape=SHAPE, pixels="none", mix=True)


@pytest.mark.parametrize(
    ("resize", "columns", "rows"),
    [
        ("cover", (55, 145), (0, 255)),
        ("stretch", (0, 200), (0, 255)),
        ("letterbox", (0, 200), (114, 114)),
        ("8", (88, 113), (112, 143)),
    ],
)
def test_images_come_to_size_as_asked(tmp_path: Path, resize: str, columns: tuple[int, int], rows: tuple[int, int]) -> None:
    """Of a 64 x 32 picture whose red grows from left to right and green from top to bottom, what is left at the borders of 8 x 8."""
    red, green = np.meshgrid(np.linspace(0, 200, 64), np.linspace(0, 255, 32))
    if resize == "8":  # the shorter side is scaled to 32, and 8 of its middle are kept
        resize = "32"
    (tmp_path / "images").mkdir()
    Image.fromarray(np.stack([red, green, 0 * red], 2).astype(np.uint8)).save(tmp_path / "images" / "a.png")
    data = load_labelled(tmp_path / "images", required=False, resize=resize)
    ((images, _),) = data.batches(1, input_shape=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    pixels = images[0] * 255

    assert pixels[0, 4, [0, -1]] == pytest.approx(columns, abs=16)
    assert pixels[1, [0, -1], 4] == pytest.approx(rows, abs=17)
