"""Labelled images come out the same, whatever they are stored in; what cannot be read is refused in one line."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.errors import DataError, DreamQuantError, OptionError

RGB = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
GREY = {"mean": (0.0,), "std": (1.0,)}


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: NDArray[Any]) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def everything(data: LabelledImages, size: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    batches = list(data.batches(size, input_shape=shape, **(RGB if shape[0] == 3 else GREY)))
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), data.labels)
    return np.concatenate([images for images, _ in batches])


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def one_image(path: Path, pixels: NDArray[Any]) -> LabelledImages:
    """A folder of one class with this image."""
    (path / "only").mkdir(parents=True)
    (path / "only" / "a.png").write_bytes(png(pixels))
    return load_labelled(path)


# ---- what comes out


def test_npz_pixels_are_scaled_and_normalised_channel_by_channel(tmp_path: Path) -> None:
    x, y = noise(7, 5, 6, 3), np.arange(7, dtype=np.uint8)
    data = load_labelled(write_npz(tmp_path / "d.npz", x=x, y=y))
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 2.0])
    batches = list(data.batches(3, input_shape=(3, 5, 6), mean=tuple(mean), std=tuple(std)))
    assert [len(images) for images, _ in batches] == [3, 3, 1]
    assert {images.dtype for images, _ in batches} == {np.dtype(np.float32)}
    assert data.labels.dtype == np.int64
    expected = ((x / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(np.concatenate([images for images, _ in batches]), expected, atol=1e-5)


def test_every_source_gives_the_same_images(tmp_path: Path) -> None:
    x, y = noise(4, 8, 8, 3), [1, 0, 2, 0]
    files = {f"{'abc'[label]}/{i}.png": png(pixels) for i, (pixels, label) in enumerate(zip(x, y, strict=True))}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    rows = [f"{name},{label}" for name, label in zip(files, y, strict=True)]
    table = write_csv(tmp_path / "labels.csv", "file,label", *rows)
    archive = write_zip(tmp_path / "d.ZIP", files)

    expected = everything(load_labelled(write_npz(tmp_path / "d.npz", x=x, y=y)), 3, (3, 8, 8))
    for source in (archive, tmp_path / "folder"):
        data = load_labelled(source, labels=table)
        assert data.labels.tolist() == y
        assert np.array_equal(everything(data, 3, (3, 8, 8)), expected)
    by_class = load_labelled(tmp_path / "folder")
    assert by_class.labels.tolist() == [0, 0, 1, 2]
    assert np.array_equal(everything(by_class, 1, (3, 8, 8)), expected[[1, 3, 0, 2]])


def test_a_spread_part_of_a_sorted_set_has_every_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(5), 20)
    pixels = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (100, 4, 4))
    whole = load_labelled(write_npz(tmp_path / "d.npz", x=pixels, y=labels))
    part = whole.spread(10)

    assert len(part) == 10
    assert np.bincount(part.labels).tolist() == [2] * 5
    images = np.concatenate([images for images, _ in part.batches(4, input_shape=(1, 4, 4), mean=[0], std=[1])])
    np.testing.assert_allclose(images[:, 0, 0, 0] * 255, np.arange(10) * 10, rtol=1e-5)
    assert whole.spread(100) is whole.spread(1000) is whole


def test_batches_may_be_read_twice_and_side_by_side(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "d.zip", {f"{i}.png": png(noise(4, 4, 3, seed=i)) for i in range(4)})
    table = write_csv(tmp_path / "l.csv", "file,label", *(f"{i}.png,{i}" for i in range(4)))
    data = load_labelled(archive, labels=table)
    pairs = zip(data.batches(2, input_shape=(3, 4, 4), **RGB), data.batches(2, input_shape=(3, 4, 4), **RGB), strict=True)
    assert all(np.array_equal(first, second) for (first, _), (second, _) in pairs)


def test_empty_classes_and_other_files_keep_the_numbering(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat", ".cache"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for name in ("ant/1.PNG", "cat/deep/2.png", ".cache/3.png"):
        (tmp_path / name).write_bytes(png(noise(2, 2, 3)))
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    assert load_labelled(tmp_path).labels.tolist() == [0, 2]


def test_csv_chooses_images_order_and_column(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "d.zip", {f"{n}.png": png(noise(2, 2, 3)) for n in "abc"} | {"readme.txt": b"hello"})
    table = tmp_path / "l.csv"
    table.write_bytes('\ufefflabel,name,file,label10\r\n305,"a, b",c.png,7\r\n1,x,a.png,0\r\n'.encode())
    assert load_labelled(archive, labels=table).labels.tolist() == [305, 1]
    assert load_labelled(archive, labels=table, label_column="label10").labels.tolist() == [7, 0]


def test_images_without_classes_where_these_are_not_needed(tmp_path: Path) -> None:
    x = noise(3, 5, 6, 3)
    files = {name: png(pixels) for name, pixels in zip(("b.png", "a.PNG", "c.png"), x, strict=True)}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in {**files, "notes.txt": b"none", "._a.png": b"none"}.items():
        (folder / name).write_bytes(data)
    archive = write_zip(tmp_path / "d.zip", {**files, "notes.txt": b"none", "deep/._a.png": b"none"})
    for path in (folder, archive):
        data = load_labelled(path, required=False)
        assert data.labels.tolist() == [-1] * 3
        np.testing.assert_allclose(everything(data, 2, (3, 5, 6)), x[[1, 0, 2]].transpose(0, 3, 1, 2) / 255, atol=1e-6)
        with pytest.raises(DataError, match="classes|csv with labels"):
            load_labelled(path)
    (folder / "only").mkdir()
    (folder / "only" / "d.png").write_bytes(files["b.png"])
    assert load_labelled(folder, required=False).labels.tolist() == [0]  # sub-folders are classes, asked for or not
    with pytest.raises(DataError, match="holds no images"):
        load_labelled(write_zip(tmp_path / "none.zip", {"notes.txt": b"none"}), required=False)


def test_grey_repeats_and_colour_turns_grey(tmp_path: Path) -> None:
    grey, colour = noise(3, 5, 4), noise(3, 5, 4, 3)
    y = np.zeros(3, np.int32)
    repeated = everything(load_labelled(write_npz(tmp_path / "g.npz", x=grey, y=y)), 2, (3, 5, 4))
    np.testing.assert_allclose(repeated, np.repeat(grey[:, None] / 255, 3, axis=1), atol=1e-6)
    single = everything(load_labelled(write_npz(tmp_path / "g1.npz", x=grey[..., None], y=y)), 2, (1, 5, 4))
    np.testing.assert_allclose(single, grey[:, None] / 255, atol=1e-6)
    luma = everything(load_labelled(write_npz(tmp_path / "c.npz", x=colour, y=y)), 2, (1, 5, 4))
    np.testing.assert_allclose(luma[:, 0], colour @ [0.299, 0.587, 0.114] / 255, atol=1 / 255)


def test_transparent_and_palette_images_are_read_as_colour(tmp_path: Path) -> None:
    colour = noise(6, 6, 3)
    alpha = np.concatenate([colour, np.full((6, 6, 1), 255, np.uint8)], axis=2)
    np.testing.assert_allclose(
        everything(one_image(tmp_path / "rgba", alpha), 1, (3, 6, 6))[0], colour.transpose(2, 0, 1) / 255, atol=1e-6
    )
    (tmp_path / "p" / "only").mkdir(parents=True)
    palette = Image.fromarray(np.zeros((6, 6), np.uint8), "L").convert("P")
    palette.putpalette([255, 0, 127] * 256)
    palette.save(tmp_path / "p" / "only" / "a.png", transparency=bytes(256))
    pixels = everything(load_labelled(tmp_path / "p"), 1, (3, 6, 6))[0]
    np.testing.assert_allclose(pixels.reshape(3, -1).T, np.tile([1, 0, 127 / 255], (36, 1)), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 31), (7, 7), (200, 33), (16, 17)])
def test_any_size_covers_the_input_and_is_cut_around_its_centre(tmp_path: Path, height: int, width: int) -> None:
    """A ramp stays a ramp of the scaled slope, and its centre stays in the centre."""
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)
    pixels = everything(one_image(tmp_path, np.tile(ramp, (height, 1))), 1, (1, 16, 16))[0, 0]
    assert pixels.shape == (16, 16)
    scale = max(16 / height, 16 / width)
    inner = pixels[8, 2:-2]
    np.testing.assert_allclose(np.diff(inner).mean(), 1 / (width - 1) / scale, rtol=0.1)
    np.testing.assert_allclose(inner.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(pixels, np.tile(pixels[:1], (16, 1)), atol=1 / 255)


def test_shrinking_antialiases(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = everything(one_image(tmp_path, checks), 1, (1, 8, 8))
    np.testing.assert_allclose(pixels, 0.5, atol=0.05)


def test_the_input_may_be_oblong(tmp_path: Path) -> None:
    left_right = np.zeros((10, 40), np.uint8)
    left_right[:, 20:] = 255
    pixels = everything(one_image(tmp_path, left_right), 1, (1, 5, 20))[0, 0]
    assert pixels[:, :9].max() == 0
    assert pixels[:, 11:].min() == 1


# ---- what is refused


def refused(message: str, call: Callable[[], object], error: type[DreamQuantError] = DataError) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": noise(2, 4, 4)}, r"has no y \(it has: x\)"),
        ({"images": noise(2, 4, 4)}, r"has no x and no y \(it has: images\)"),
        ({"x": noise(2, 4, 4) / 255, "y": [0, 1]}, "x of .* is float64, it must be uint8"),
        ({"x": noise(2, 3, 8, 8), "y": [0, 1]}, r"has shape \(2, 3, 8, 8\)"),
        ({"x": noise(4, 4), "y": [0] * 4}, r"has shape \(4, 4\)"),
        ({"x": noise(0, 4, 4), "y": np.zeros(0, int)}, r"has shape \(0, 4, 4\)"),
        ({"x": noise(2, 4, 4), "y": [0.0, 1.0]}, r"y of .* is float64 \(2,\), it must be an integer for each of 2"),
        ({"x": noise(2, 4, 4), "y": [0, 1, 2]}, r"y of .* is int64 \(3,\)"),
        ({"x": noise(2, 4, 4), "y": [0, -1]}, "negative label -1"),
        ({"x": noise(2, 4, 4), "y": np.array([0, 2**63], np.uint64)}, "negative label"),
        ({"x": noise(2, 4, 4), "y": np.array([0, None])}, "is not a readable npz file: Object arrays"),
    ],
)
def test_npz_that_is_not_labelled_images(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "d.npz", **arrays)
    refused(message, lambda: load_labelled(path))


def test_npz_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
            return (tmp_path / "sprung").touch, ()

    path = write_npz(tmp_path / "d.npz", x=noise(1, 2, 2), y=np.array([Trap()], dtype=object))
    refused("not a readable npz file", lambda: load_labelled(path))
    assert not (tmp_path / "sprung").exists()


def test_broken_containers(tmp_path: Path) -> None:
    broken = tmp_path / "d.npz"
    broken.write_bytes(b"PK\x03\x04 and nothing more")
    refused("not a readable npz file: it is not a zip archive", lambda: load_labelled(broken))
    whole = write_npz(tmp_path / "w.npz", x=noise(9, 9, 9), y=np.arange(9)).read_bytes()
    (tmp_path / "w.npz").write_bytes(whole[:300] + bytes(100) + whole[400:])
    refused("not a readable npz file", lambda: load_labelled(tmp_path / "w.npz"))
    archive = tmp_path / "d.zip"
    archive.write_bytes(b"not a zip")
    table = write_csv(tmp_path / "l.csv", "file,label", "a.png,0")
    refused("not a readable zip file", lambda: load_labelled(archive, labels=table))


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    refused("absent does not exist", lambda: load_labelled(tmp_path / "absent"))
    refused("has no sub-folders, one per class, and no csv", lambda: load_labelled(tmp_path))
    (tmp_path / "one").mkdir()
    refused("the 1 sub-folders of .* hold no images", lambda: load_labelled(tmp_path))
    (tmp_path / "d.tar").touch()
    refused(r"known: a folder, \.npz, \.zip", lambda: load_labelled(tmp_path / "d.tar"))
    refused(r"no file .*l\.csv", lambda: load_labelled(tmp_path, labels=tmp_path / "l.csv"))
    archive = write_zip(tmp_path / "d.zip", {"a.png": png(noise(2, 2, 3))})
    refused("a csv with labels is needed", lambda: load_labelled(archive))


def test_an_npz_takes_no_csv(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", x=noise(1, 2, 2), y=[0])
    table = write_csv(tmp_path / "l.csv", "file,label", "a.png,0")
    refused("has its own labels", lambda: load_labelled(path, labels=table), OptionError)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["name,wnid", "a.png,n01"], r"no column 'file' and no column 'label' \(it has: name, wnid\)"),
        (["file,class", "a.png,1"], r"no column 'label' \(it has: file, class\)"),
        (["file,label", "a.png,cat"], "line 2: the label 'cat' is not a class number"),
        (["file,label", "a.png,0", "a.png,1.0"], "line 3: the label '1.0'"),
        (["file,label", "a.png,-1"], "the label '-1'"),
        (["file,label", "a.png"], "the label ''"),
        (["file,label", "a.png,99999999999999999999"], "is not a class number"),
        (["file,label"], "names no images"),
        ([""], r"has no column .* \(it has: none\)"),
        (["file,label", "a.png,0", "b.png,0", "c.png,1"], r"2 of the 3 images that .* the first is 'b\.png'"),
        (["file,label", "a.png,0", "x" * 300 + ",0"], "1 of the 2 images"),
        (["label,file", "0"], "the first is ''"),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, rows: list[str], message: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(noise(2, 2, 3)))
    archive = write_zip(tmp_path / "d.zip", {"a.png": png(noise(2, 2, 3))})
    table = write_csv(tmp_path / "l.csv", *rows)
    refused(message, lambda: load_labelled(folder, labels=table))
    refused(message, lambda: load_labelled(archive, labels=table))


def test_a_csv_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(png(noise(9, 9, 3)))
    refused("not a readable csv file", lambda: load_labelled(tmp_path, labels=tmp_path / "l.csv"))


def test_a_broken_image_is_named_when_its_batch_comes(tmp_path: Path) -> None:
    whole = png(noise(32, 32, 3))
    archive = write_zip(tmp_path / "d.zip", {"a.png": whole, "b.png": whole[: len(whole) // 2], "c.png": b"text"})
    for name in ("b", "c"):
        table = write_csv(tmp_path / f"{name}.csv", "file,label", "a.png,0", f"{name}.png,0")
        batches = load_labelled(archive, labels=table).batches(1, input_shape=(3, 32, 32), **RGB)
        assert next(batches)[0].shape == (1, 3, 32, 32)
        refused(rf"{name}\.png in .*d\.zip is not a readable image", lambda batches=batches: next(batches))


def test_deep_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    data = one_image(tmp_path, np.full((4, 4), 40_000, np.uint16))
    refused("more than 8 bits a channel", lambda: everything(data, 1, (1, 4, 4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": (0.5,)}, OptionError, "mean has 1 values and the network takes 3 channels"),
        ({"std": ()}, OptionError, "std has 0 values and the network takes 3 channels"),
        ({"std": (1, 0, 1)}, OptionError, "std is 1, 0, 1, and must be finite and positive"),
        ({"mean": (0, float("nan"), 0)}, OptionError, "mean is 0, nan, 0, and must be finite"),
        ({"size": 0}, OptionError, "a batch of 0 images"),
        ({"input_shape": (2, 4, 4), "mean": (0, 0), "std": (1, 1)}, DataError, "1 or 3 channels, the network takes 2"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], error: type[DreamQuantError], message: str) -> None:
    data = load_labelled(write_npz(tmp_path / "d.npz", x=noise(1, 4, 4), y=[0]))
    given: dict[str, Any] = {"size": 1, "input_shape": (3, 4, 4), **RGB, **options}
    refused(message, lambda: data.batches(**given), error)
