"""Labelled images for measuring what answers are worth: from folders, zip files and npz files, decoded batch by batch."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dreamquant.assess.truths import CLASS, MASKS, Mask, Truths, of_array, of_coco, of_csv
from dreamquant.errors import DataError, OptionError, blamed, unknown
from dreamquant.limits import check_archive, check_memory

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

LARGEST_IMAGE = 89_478_485  # pixels; above it Pillow, too, suspects a bomb
LARGEST_FILE = 8 * LARGEST_IMAGE  # bytes: four channels and whatever is stored beside them
_BATCH_BYTES = 1 + 4 + 4  # of a value: as a pixel, as a number, and as a normalised one
RESIZES = ("cover", "letterbox", "stretch")
LARGEST_SIDE = 2**14
LETTERBOX = 114  # the grey of the borders, as YOLO's detectors have it

_MODES = {1: "L", 3: "RGB"}
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: Pillow would clip instead of scale
Reader = Callable[[int], Image.Image]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of any size with the number of the class of each.

    `labels` is int64 (N,), none negative, or -1 for every image where nobody has told the classes. `reader` opens the source
    and gives the function that decodes image i, `resize` is how images come to a network's size. `truths` are what is true of
    the images in other forms than that of classes, where that is told.
    """

    labels: NDArray[np.int64]
    reader: Callable[[], AbstractContextManager[Reader]] = field(repr=False)
    resize: str = "cover"
    truths: Truths | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def spread(self, count: int) -> LabelledImages:
        """`count` of the images at even distances, so that a set sorted by class keeps them all; all if there are fewer."""
        if count >= len(self):
            return self
        return self.chosen(np.arange(count) * len(self) // count)

    def chosen(self, places: Sequence[int] | NDArray[np.int64]) -> LabelledImages:
        """The images in these places, in this order."""
        kept = np.asarray(places, np.int64)

        @contextmanager
        def reader() -> Iterator[Reader]:
            with self.reader() as read:
                yield lambda i: read(int(kept[i]))

        truths = None if self.truths is None else self.truths.chosen(kept)
        return LabelledImages(self.labels[kept], reader, self.resize, truths)

    def batches(
        self,
        size: int,
        *,
        input_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        channels: str = "",
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Batches of `size` (the last may be smaller) as a network of `input_shape` (C, H, W) takes them: float32
        (n, C, H, W) with int64 (n,) labels, in order.

        Images become grey (C = 1) or RGB (C = 3), BGR where that is what `channels` says. One of another size is scaled, bilinear
        with antialiasing, as `resize` says: until it covers (H, W), and cut around its centre ("cover"); until its shorter side
        has so many pixels, and cut likewise ("256"); until it fits into (H, W), between borders of grey 114 ("letterbox"); or to
        (H, W) whatever its own shape ("stretch"). Pixels are (x / 255 - mean) / std. EXIF
        orientation is not applied, as training code does not. Raises OptionError for a wrong `size`, `mean` or `std`, DataError
        for a network that takes neither 1 nor 3 channels and for a broken image.
        """
        if size < 1:
            raise OptionError(f"a batch of {size} images is impossible, it must be at least 1")
        check_normalisation(mean, std, channels=input_shape[0])
        if input_shape[0] not in _MODES:
            raise DataError(f"images have 1 or 3 channels, the network takes {input_shape[0]}")
        together = min(size, len(self))
        needed = _BATCH_BYTES * together * math.prod(input_shape)
        check_memory(needed, f"a batch of {together} images {input_shape}", OptionError)
        shift, scale = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
        order = -1 if channels == "bgr" else 1
        pixels = ((pixels[:, ::order], labels) for pixels, labels in self._batches(size, input_shape))
        return (((values.astype(np.float32) / np.float32(255) - shift) / scale, labels) for values, labels in pixels)

    def _batches(self, size: int, input_shape: tuple[int, int, int]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        with self.reader() as read:
            for start in range(0, len(self), size):
                labels = self.labels[start : start + size]
                yield np.stack([_pixels(read(start + i), input_shape, self.resize) for i in range(len(labels))]), labels


def load_labelled(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    label_column: str = "label",
    required: bool = True,
    resize: str = "cover",
) -> LabelledImages:
    """Labelled images from one of

    - a folder with one sub-folder per class: the sorted names of the sub-folders are the classes 0, 1, ...;
    - a folder or a .zip with the csv `labels`: its `file` column is the name inside, `label_column` the class number, or
      several with spaces between; images that the csv does not name are left out;
    - a folder or a .zip with the folder `labels` of masks, each a .png with the image's name and the class of each pixel, or
      with the .json `labels` of boxes in COCO's form;
    - an .npz with `x` uint8 (N, H, W, C) or (N, H, W), and integer `y` (N,), or other labels as `truths.of_array` takes them;
    - where labels are not `required`, a folder of images, a .zip or an .npz without any.

    `resize` is how images come to a network's size, as `LabelledImages.batches` does it. Zip files are read in place, image by
    image. Raises DataError when anything is missing, unreadable or not as said
    here, OptionError when `labels` are given for an .npz.
    """
    path, labels = Path(path), None if labels is None else Path(labels)
    check_resize(resize)
    if labels is not None and not labels.exists():
        raise DataError(f"there is no file {labels} with labels")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    with blamed(DataError, f"{path} cannot be read"):
        if path.is_dir():
            return replace(_from_folder(path, labels, label_column, required), resize=resize)
        if path.suffix.lower() == ".zip":
            return replace(_from_zip(path, labels, label_column, required), resize=resize)
        if path.suffix.lower() == ".npz":
            return replace(_from_npz(path, labels, required), resize=resize)
    raise DataError(f"{path} is not a kind of labelled data that is known (known: a folder, .npz, .zip)")


def check_normalisation(mean: Sequence[float], std: Sequence[float], *, channels: int) -> None:
    """Raise OptionError unless `mean` and `std` have one finite value per channel and `std` is positive."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise OptionError(f"{name} has {len(values)} values and the network takes {channels} channels")
        if not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
            kind = "finite" if name == "mean" else "finite and positive"
            raise OptionError(f"{name} is {', '.join(f'{v:g}' for v in values)}, and must be {kind}")


# ---- sources


def _from_folder(folder: Path, labels: Path | None, label_column: str, required: bool) -> LabelledImages:
    if labels is None:
        names, numbers = _classes_of(folder, required)
        return LabelledImages(np.array(numbers, np.int64), partial(_folder_reader, folder, names))
    names, truths = _told(labels, label_column, lambda: _images_below(folder))
    inside = {name for name in set(names) if _leads_inside(name) and _is_file(folder / name)}
    _check_inside(names, inside, folder, labels)
    return _of_truths(truths, partial(_folder_reader, folder, names))


def _of_truths(truths: Truths, reader: Callable[[], AbstractContextManager[Reader]]) -> LabelledImages:
    return LabelledImages(truths.classes, reader, truths=None if truths.form == CLASS else truths)


def _told(labels: Path, label_column: str, images: Callable[[], list[str]]) -> tuple[list[str], Truths]:
    """The names of images and what is true of each, as labels tell it: a folder of masks (then of all `images`), COCO's .json, or
    a csv."""
    if labels.is_dir():
        names = images()
        masks = _masks(labels, names)
        return names, Truths(MASKS, masks)
    return of_coco(labels) if labels.suffix.lower() == ".json" else of_csv(labels, label_column)


def _images_below(folder: Path) -> list[str]:
    return _images_among(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _masks(folder: Path, names: Sequence[str]) -> list[Mask]:
    """The mask of each image: the .png in `folder` that is called as it is."""
    files = [folder / PurePosixPath(name).with_suffix(".png") for name in names]
    missing = [file for file in files if not _is_file(file)]
    if missing or not files:
        count = (
            f"{len(missing)} of the {len(files)} images have no mask, the first should be {missing[0]}"
            if missing
            else "no images"
        )
        raise DataError(f"{folder} is a folder of labels: {count}")
    return [partial(_mask, file) for file in files]


def _mask(file: Path) -> Image.Image:
    """The class of each pixel: a palette's number, or a grey level."""
    image = _decode(partial(_whole, file), str(file))
    if image.mode not in ("L", "P", "1"):
        raise DataError(f"{file} is no mask: its pixels are {image.mode}, not one class number each")
    return Image.fromarray(np.asarray(image, np.uint8))


def _classes_of(folder: Path, required: bool) -> tuple[list[str], list[int]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names = [] if required or classes else _images_among(entry.name for entry in folder.iterdir())
    if names:
        return names, [-1] * len(names)
    if not classes:
        raise DataError(f"{folder} has no sub-folders, one per class, and no csv with labels was given")
    numbers: list[int] = []
    for number, entry in enumerate(classes):
        files = sorted(file for file in entry.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        names += [file.relative_to(folder).as_posix() for file in files]
        numbers += [number] * len(files)
    if not names:
        raise DataError(f"the {len(classes)} sub-folders of {folder} hold no images")
    return names, numbers


def _images_among(files: Iterable[str]) -> list[str]:
    paths = ((name, PurePosixPath(name)) for name in sorted(files))
    return [name for name, path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]


def _from_zip(path: Path, labels: Path | None, label_column: str, required: bool) -> LabelledImages:
    if labels is None and required:
        raise DataError(f"{path} holds images without their classes: a csv with labels is needed")
    inside = _members(path)
    if labels is None:
        names = _images_among(inside)
        if not names:
            raise DataError(f"{path} holds no images")
        return LabelledImages(np.full(len(names), -1), partial(_zip_reader, path, names))
    names, truths = _told(labels, label_column, lambda: _images_among(inside))
    _check_inside(names, inside, path, labels)
    return _of_truths(truths, partial(_zip_reader, path, names))


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable zip file: {_line(error)}") from error


def _from_npz(path: Path, labels: Path | None, required: bool) -> LabelledImages:
    if labels is not None:
        raise OptionError(f"{path} has its own labels, those of {labels} cannot be used")
    images, classes = _arrays(path, required)
    if images.dtype != np.uint8:
        raise DataError(f"x of {path} is {images.dtype}, it must be uint8 pixels in 0..255")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in _MODES)) or images.size == 0:
        raise DataError(f"x of {path} has shape {images.shape}, it must be (N, H, W) or (N, H, W, 1 or 3)")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    reader: Callable[[], AbstractContextManager[Reader]] = lambda: nullcontext(lambda i: Image.fromarray(images[i]))  # noqa: E731
    if classes is None:
        return LabelledImages(np.full(len(images), -1), reader)
    return _of_truths(of_array(classes, len(images), f"y of {path}"), reader)


def _arrays(path: Path, required: bool) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not a readable npz file: it is not a zip archive of arrays")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as archive:
            known = archive.files
            check_archive(archive.zip, archive.zip.namelist(), str(path), DataError)
            found = {name: archive[name] for name in ("x", "y") if name in known}
    except DataError:
        raise
    except Exception as error:  # numpy raises whatever the broken bytes lead to
        raise DataError(f"{path} is not a readable npz file: {_line(error)}") from error
    missing = [name for name in ("x", "y") if name not in found and (required or name == "x")]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)} (it has: {', '.join(known) or 'nothing'})")
    return found["x"], found.get("y")


def _check_inside(names: Sequence[str], inside: set[str], source: Path, labels: Path) -> None:
    missing = [name for name in names if name not in inside]
    if missing:
        count = f"{len(missing)} of the {len(names)} images"
        raise DataError(f"{count} that {labels} names are not in {source}, the first is {missing[0]!r}")


def _leads_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


# ---- pixels


@contextmanager
def _folder_reader(folder: Path, names: Sequence[str]) -> Iterator[Reader]:
    yield lambda i: _decode(partial(_whole, folder / names[i]), str(folder / names[i]))


def _whole(path: Path) -> bytes:
    _check_length(path.stat().st_size, str(path))
    return path.read_bytes()


def _check_length(length: int, where: str) -> None:
    if length > LARGEST_FILE:
        raise DataError(f"{where} has {length:,} bytes; images of at most {LARGEST_FILE:,} are read")


@contextmanager
def _zip_reader(path: Path, names: Sequence[str]) -> Iterator[Reader]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable zip file: {_line(error)}") from error
    with archive:
        yield lambda i: _decode(partial(_unpacked, archive, names[i], path), f"{names[i]} in {path}")


def _unpacked(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    _check_length(archive.getinfo(name).file_size, f"{name} in {path}")
    return archive.read(name)


def _decode(read: Callable[[], bytes], where: str) -> Image.Image:
    with blamed(DataError, f"{where} is not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow suspects of an image's metadata, and of sizes that are checked here
        image = Image.open(BytesIO(read()))
        pixels = image.width * image.height
        if pixels > LARGEST_IMAGE:
            raise DataError(f"{where} has {pixels:,} pixels ({image.width} x {image.height}); at most {LARGEST_IMAGE:,} are read")
        image.load()
    if image.mode.startswith(_DEEP_MODES):
        raise DataError(f"{where} has more than 8 bits a channel (mode {image.mode}), only 8 are read")
    return image


def check_resize(resize: str) -> None:
    """`OptionError` unless `resize` is a way to scale images that is known."""
    if resize not in RESIZES and not (resize.isascii() and resize.isdecimal() and 0 < int(resize) <= LARGEST_SIDE):
        raise OptionError(f"{unknown('resize', resize, RESIZES)}, or the shorter side's pixels, as in 256")


def _pixels(image: Image.Image, input_shape: tuple[int, int, int], resize: str) -> NDArray[np.uint8]:
    """uint8 (C, H, W), converted and resized."""
    channels, height, width = input_shape
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert(_MODES[channels])
    if image.size != (width, height):
        image = resized(image, width, height, resize)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def resized(
    image: Image.Image,
    width: int,
    height: int,
    resize: str,
    method: Image.Resampling = Image.Resampling.BILINEAR,
    border: int = LETTERBOX,
) -> Image.Image:
    """An image of one or three channels, brought to a size as `resize` says, with a `border` of one number where it does not
    reach."""
    if resize == "stretch":
        return image.resize((width, height), method)
    if resize == "letterbox":
        return ImageOps.pad(image, (width, height), method, color=border if image.mode == "L" else (border,) * 3)
    if resize != "cover":
        scale = int(resize) / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), method)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if left >= 0 and top >= 0:
            return image.crop((left, top, left + width, top + height))
    return ImageOps.fit(image, (width, height), method=method)


Pair = tuple[float, float]


def placed(size: tuple[int, int], to: tuple[int, int], resize: str) -> tuple[Pair, Pair]:
    """Where a pixel (x, y) of an image of `size` (width, height) comes to lie in what `resized` makes of it: at (x, y) * scale +
    shift, to a pixel."""
    ratios = to[0] / size[0], to[1] / size[1]
    if resize == "stretch":
        return ratios, (0.0, 0.0)
    scale = min(ratios) if resize == "letterbox" else max(ratios)
    if resize not in RESIZES:
        scale = max(scale, int(resize) / min(size))
    return (scale, scale), ((to[0] - size[0] * scale) / 2, (to[1] - size[1] * scale) / 2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
