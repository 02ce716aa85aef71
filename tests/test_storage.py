"""Samples come back from files as they were, or not at all."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dreamquant.assess.labelled import load_labelled
from dreamquant.errors import DataError, OptionError, OutputError
from dreamquant.network.graph import Network
from dreamquant.network.input_space import of_pixels
from dreamquant.samples import Samples
from dreamquant.storage import contact_sheet, load_samples, read_samples, save_samples, write_samples
from dreamquant.synthesis import synthesize

MADE_BY: dict[str, Any] = {"method": "mine", "count": 3, "seed": 7, "options": {"steps": 5, "rate": 0.1}}


@pytest.fixture
def samples(residual: Network) -> Samples:
    images = torch.randn(3, *residual.input_shape, generator=torch.Generator().manual_seed(0))
    confidence = torch.tensor([0.5, 0.25, 1.0])
    options = {"steps": 5, "rate": 0.1}
    return Samples(images, torch.tensor([2, 0, 1]), "mine", 7, options, losses=(3.5, 1 / 3), confidence=confidence)


@pytest.fixture
def normalised(residual: Network) -> Network:
    """A network that tells what its pixels are normalised with."""
    return replace(residual, space=of_pixels((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))


def test_samples_come_back_as_they_were(samples: Samples, tmp_path: Path) -> None:
    save_samples(samples, tmp_path / "s.safetensors", MADE_BY)
    again = load_samples(tmp_path / "s.safetensors", MADE_BY)

    assert again is not None
    assert torch.equal(again.images, samples.images)
    assert again.labels is not None
    assert samples.labels is not None
    assert torch.equal(again.labels, samples.labels)
    assert again.confidence is not None
    assert again.confidence.tolist() == [0.5, 0.25, 1.0]
    assert (again.method, again.seed, again.losses, again.options) == ("mine", 7, samples.losses, MADE_BY)


def test_what_was_not_there_is_not_there_again(samples: Samples, tmp_path: Path) -> None:
    bare = replace(
        samples, labels=None, confidence=None, losses=(), images=samples.images.contiguous(memory_format=torch.channels_last)
    )
    save_samples(bare, tmp_path / "s.safetensors", MADE_BY)
    again = load_samples(tmp_path / "s.safetensors", MADE_BY)

    assert again is not None
    assert again.labels is None
    assert again.confidence is None
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


def test_npz_holds_images_labels_and_confidence(samples: Samples, residual: Network, tmp_path: Path) -> None:
    write_samples(samples, residual, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["confidence", "images", "labels"]
        assert np.array_equal(file["images"], samples.images.numpy())
        assert file["labels"].tolist() == [2, 0, 1]
    write_samples(replace(samples, labels=None, confidence=None), residual, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file) == ["images"]


def test_safetensors_can_be_read_by_others(samples: Samples, residual: Network, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_samples(samples, residual, tmp_path / "s.safetensors")
    assert torch.equal(load_file(tmp_path / "s.safetensors")["images"], samples.images)


def pixels(samples: Samples, network: Network) -> torch.Tensor:
    """What images stand for, in 0..1 where a pixel can hold it."""
    shape = (-1, 1, 1)
    return samples.images * torch.tensor(network.std).view(shape) + torch.tensor(network.mean).view(shape)


def test_a_sheet_shows_every_image_as_the_pixels_it_stands_for(samples: Samples, normalised: Network) -> None:
    sheet = np.asarray(contact_sheet(samples, normalised, columns=2)).astype(int)
    third = (pixels(samples, normalised)[2].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()

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


@pytest.mark.parametrize("name", ["s.jpg", "s.v2", "s.onnx"])
def test_another_suffix_is_refused(samples: Samples, residual: Network, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"known: \.safetensors, \.npz, \.png"):
        write_samples(samples, residual, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_every_image_and_how_it_was_made(samples: Samples, normalised: Network, tmp_path: Path) -> None:
    folder = tmp_path / "dreams"
    write_samples(samples, normalised, folder)

    names = ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "contact_sheet.png", "labels.csv", "samples.json"]
    values = pixels(samples, normalised)
    for name, expected in zip(names, values, strict=True):
        with Image.open(folder / name) as image:
            found = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        assert (found - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["label"], float(row["confidence"])) for row in rows] == [
        ("00000.png", "2", 0.5),
        ("00001.png", "0", 0.25),
        ("00002.png", "1", 1.0),
    ]
    made = json.loads((folder / "samples.json").read_text())
    assert (made["method"], made["seed"], made["options"]) == ("mine", 7, {"steps": 5, "rate": 0.1})
    assert tuple(made["losses"]) == samples.losses
    beyond = (values * 255).round()
    assert made["clipped"] == pytest.approx(((beyond < 0) | (beyond > 255)).float().mean().item())
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_can_be_evaluated_on(samples: Samples, normalised: Network, tmp_path: Path) -> None:
    write_samples(samples, normalised, tmp_path / "dreams")
    labelled = load_labelled(tmp_path / "dreams", labels=tmp_path / "dreams" / "labels.csv")
    shown = {"input_shape": normalised.input_shape, "mean": normalised.mean, "std": normalised.std}
    ((images, labels),) = labelled.batches(8, **shown)  # type: ignore[arg-type]

    assert images.shape == samples.images.shape
    assert labels.tolist() == [2, 0, 1]


def test_a_grey_folder_has_grey_images_and_only_the_columns_that_are_known(
    samples: Samples, residual: Network, tmp_path: Path
) -> None:
    grey = replace(samples, images=samples.images[:, :1], labels=None, confidence=None)
    network = replace(residual, input_shape=(1, 11, 9), space=of_pixels((0.5,), (0.2,)))
    write_samples(grey, network, tmp_path / "dreams")

    assert (tmp_path / "dreams" / "labels.csv").read_text().splitlines()[0] == "file"
    with Image.open(tmp_path / "dreams" / "00000.png") as image:
        assert (image.mode, image.size) == ("L", (9, 11))


def test_nothing_is_clipped_of_images_that_keep_to_the_range(normalised: Network, tmp_path: Path) -> None:
    for count in (1, 2):
        write_samples(synthesize(normalised, count, method="fractal"), normalised, tmp_path / "dreams")
        assert json.loads((tmp_path / "dreams" / "samples.json").read_text())["clipped"] == 0


def test_a_folder_needs_pixels(samples: Samples, residual: Network, normalised: Network, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs mean and std"):
        write_samples(samples, residual, tmp_path / "dreams")
    with pytest.raises(OptionError, match="1 or 3 channels, and .* takes 4"):
        write_samples(samples, replace(normalised, input_shape=(4, 11, 9)), tmp_path / "dreams")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_before_is_replaced(samples: Samples, normalised: Network, tmp_path: Path) -> None:
    folder = tmp_path / "dreams"
    folder.mkdir()  # an empty one is no reason to refuse
    write_samples(samples, normalised, folder)
    write_samples(replace(samples, images=samples.images[:1], labels=None, confidence=None), normalised, folder)

    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "contact_sheet.png", "labels.csv", "samples.json"]
    assert list(tmp_path.iterdir()) == [folder]


def other_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def other_folder(folder: Path) -> None:
    (folder / "00003.png").mkdir()


def other_settings(folder: Path) -> None:
    (folder / "samples.json").write_text('{"method": "mine"}')


def broken_settings(folder: Path) -> None:
    (folder / "samples.json").write_text("{")


@pytest.mark.parametrize("change", [other_file, other_folder, other_settings, broken_settings])
def test_a_folder_with_anything_else_is_kept(
    change: Callable[[Path], None], samples: Samples, normalised: Network, tmp_path: Path
) -> None:
    folder = tmp_path / "dreams"
    write_samples(samples, normalised, folder)
    change(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(OutputError, match="is a folder that holds .*, which would be lost"):
        write_samples(samples, normalised, folder)

    assert sorted(folder.iterdir()) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_and_the_working_folder_are_no_output(
    samples: Samples, normalised: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="it is a file, and a folder"):
        write_samples(samples, normalised, tmp_path / "file")
    with pytest.raises(OutputError, match="does not exist"):
        write_samples(samples, normalised, tmp_path / "nowhere" / "dreams")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="the working folder"):
        write_samples(samples, normalised, Path())


@pytest.mark.parametrize("name", ["pixels", "file", "a/b:0", "arr_0"])
def test_an_npz_for_an_input_holds_nothing_else(name: str, samples: Samples, residual: Network, tmp_path: Path) -> None:
    write_samples(samples, residual, tmp_path / "s.npz", input_name=name)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert file.files == [name]
        assert np.array_equal(file[name], samples.images.numpy())
    assert torch.equal(read_samples(tmp_path / "s.npz").images, samples.images)


@pytest.mark.parametrize("output", ["s.safetensors", "s.png", "s"])
def test_only_an_npz_is_for_an_input(output: str, samples: Samples, normalised: Network, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"in an \.npz only"):
        write_samples(samples, normalised, tmp_path / output, input_name="pixels")


def test_what_was_written_can_be_read(samples: Samples, residual: Network, tmp_path: Path) -> None:
    for name in ("s.safetensors", "s.npz"):
        write_samples(samples, residual, tmp_path / name)
        again = read_samples(str(tmp_path / name))
        assert torch.equal(again.images, samples.images)
        assert again.labels is not None
        assert again.labels.tolist() == [2, 0, 1]
        assert again.confidence is not None
        assert again.confidence.tolist() == [0.5, 0.25, 1.0]
    whole = read_samples(tmp_path / "s.safetensors")
    assert (whole.method, whole.seed, whole.options, whole.losses) == ("mine", 7, samples.options, samples.losses)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_file_is_told(suffix: str, share: float, samples: Samples, residual: Network, tmp_path: Path) -> None:
    path = tmp_path / f"s{suffix}"
    write_samples(samples, residual, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=f"s{suffix} is not a readable {suffix} file: .") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "s.npz", images=np.array([Trap()], dtype=object))
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("s.npz", "p.npz"):
        with pytest.raises(DataError, match="is not a readable .npz file"):
            read_samples(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros(2), "y": np.zeros(2)}, r"no array 'images' \(it has: x, y\)"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \(2, 3, 4, 4\), not float32"),
        ({"images": np.zeros((3, 4, 4), np.float32)}, "not float32"),
        ({"images": np.zeros((0, 3, 4, 4), np.float32)}, "at least one"),
        ({"images": np.full((2, 3, 4, 4), np.nan, np.float32)}, "NaN or infinite"),
        ({"images": np.zeros((2, 3, 4, 4), np.float32), "labels": np.zeros(3, np.int64)}, "2 images and labels of shape"),
        ({"images": np.zeros((2, 3, 4, 4), np.float32), "confidence": np.zeros((2, 1), np.float32)}, "confidence of shape"),
    ],
)
def test_what_does_not_fit_together_is_told(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "s.safetensors")
    for name in ("s.npz", "s.safetensors"):
        with pytest.raises(DataError, match=says):
            read_samples(tmp_path / name)


def test_a_missing_file_and_another_kind_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_samples(tmp_path / "s.npz")
    with pytest.raises(DataError, match=r"known: \.safetensors, \.npz"):
        read_samples(tmp_path / "s.png")


@pytest.mark.parametrize("settings", ["[]", "{", '{"options": 3}', '{"seed": "x"}'])
def test_settings_that_are_none_are_told(settings: str, tmp_path: Path) -> None:
    save_file({"images": torch.zeros(1, 3, 4, 4)}, tmp_path / "s.safetensors", {"made_by": settings})
    with pytest.raises(DataError, match="is not a readable .safetensors file"):
        read_samples(tmp_path / "s.safetensors")
