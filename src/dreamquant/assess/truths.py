"""What is true of images, in the forms that labels come in: classes, lists of classes, masks, boxes, numbers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreamquant.errors import DataError, reason
from dreamquant.limits import check_memory

CLASS, LISTS, MASKS, BOXES, NUMBERS = "classes", "lists of classes", "masks", "boxes", "numbers"
_OBJECT = 64  # bytes of memory that a byte of JSON may become

Mask = Callable[[], Image.Image]  # gives the class of each pixel, as an image of one channel


@dataclass(frozen=True)
class TrueBoxes:
    """The boxes of an image in COCO's form, where `bbox` is left, top, width and height in the image's pixels; its size (width,
    height) in these; and the numbers of the categories, in order: class 0 is the first of them."""

    annotations: Sequence[Mapping[str, Any]]
    size: tuple[int, int]
    categories: tuple[int, ...]


@dataclass(frozen=True)
class Truths:
    """What is true of each of some images, all in one form: for `CLASS` a number, for `LISTS` a list of them, for `MASKS` a
    `Mask`, for `BOXES` `TrueBoxes`, for `NUMBERS` an array of floats."""

    form: str
    each: Sequence[Any]

    def chosen(self, places: Iterable[int]) -> Truths:
        """What is true of the images in these places."""
        return Truths(self.form, [self.each[place] for place in places])

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class of each image, -1 where the labels are of another form."""
        return np.array(self.each if self.form == CLASS else np.full(len(self.each), -1), np.int64)


def of_csv(path: Path, column: str) -> tuple[list[str], Truths]:
    """Names in the column `file`, and class numbers in another, or lists of these between spaces: where one cell has several,
    all are lists. `DataError` for what is neither."""
    names, cells = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            _check_columns(path, rows.fieldnames or (), column)
            for row in rows:
                names.append(row["file"] or "")
                cells.append((f"{path}, line {rows.line_num}", row[column] or ""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable csv file: {reason(error)}") from error
    if not names:
        raise DataError(f"{path} names no images")
    if any(len(cell.split()) > 1 for _, cell in cells):
        return names, Truths(LISTS, [[_class_number(part, where) for part in cell.split()] for where, cell in cells])
    return names, Truths(CLASS, [_class_number(cell, where) for where, cell in cells])


def _check_columns(path: Path, columns: Iterable[str], column: str) -> None:
    known = list(columns)
    missing = [name for name in ("file", column) if name not in known]
    if missing:
        raise DataError(
            f"{path} has no column {' and no column '.join(map(repr, missing))} (it has: {', '.join(known) or 'none'})"
        )


def _class_number(text: str, where: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise DataError(f"{where}: the label {text!r} is not a class number (0, 1, 2, ...)")
    return number


def of_coco(path: Path) -> tuple[list[str], Truths]:
    """Names and boxes of the images in a file of COCO's form: `images` (`id`, `file_name`, `width`, `height`), `annotations`
    (`image_id`, `category_id`, `bbox`) and `categories` (`id`). `DataError` where it is another."""
    check_memory(_OBJECT * path.stat().st_size, f"the labels in {path}", DataError)
    try:
        told = json.loads(path.read_bytes())
        categories = tuple(sorted({int(one["id"]) for one in told["categories"]}))
        boxes: dict[Any, list[Mapping[str, Any]]] = {one["id"]: [] for one in told["images"]}
        for one in told["annotations"]:
            sides = [float(side) for side in one["bbox"]]
            if (
                len(sides) != 4
                or not all(map(math.isfinite, sides))
                or min(sides[2:]) < 0
                or one["category_id"] not in categories
            ):
                raise ValueError(f"the annotation {one} is no box of a category")
            boxes[one["image_id"]].append(one | {"bbox": sides})
        each = [TrueBoxes(boxes[one["id"]], (int(one["width"]), int(one["height"])), categories) for one in told["images"]]
        names = [str(one["file_name"]) for one in told["images"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a file of boxes in COCO's form: {type(error).__name__}: {reason(error)}") from error
    if not names or min(min(true.size) for true in each) < 1:
        raise DataError(f"{path} names no images" if not names else f"{path} has images without a size")
    return names, Truths(BOXES, each)


def of_array(given: NDArray[Any], count: int, where: str) -> Truths:
    """The labels of `count` images in an array whose form tells what they are: integers (N,) are classes, (N, L) lists of them
    that -1 fills up, (N, H, W) masks; true or false (N, K) tells whether each of K classes holds; floats (N, ...) are numbers."""
    whole, bits = given.dtype.kind in "iu", given.dtype.kind == "b"
    numbers = given.dtype.kind == "f" and given.ndim > 1
    if given.ndim == 0 or len(given) != count or not (whole or bits or numbers):
        told = f"{where} is {given.dtype} {given.shape}"
        raise DataError(f"{told}, it must be an integer for each of {count} images, or labels of another form")
    if numbers:
        if not np.isfinite(given).all():
            raise DataError(f"{where} has numbers that are NaN or infinite")
        return Truths(NUMBERS, list(given.astype(np.float64).reshape(count, -1)))
    if bits and given.ndim == 2:
        return Truths(LISTS, [np.flatnonzero(row).tolist() for row in given])
    if whole and given.ndim == 1:
        classes = given.astype(np.int64)
        if count and classes.min() < 0:
            raise DataError(f"{where} has the negative label {classes.min()}")
        return Truths(CLASS, classes.tolist())
    if whole and given.ndim == 2:
        return Truths(LISTS, [[int(one) for one in row if one >= 0] for row in given])
    if whole and given.ndim == 3 and given.size and given.min() >= 0 and given.max() <= 255:
        return Truths(MASKS, [partial(Image.fromarray, mask) for mask in given.astype(np.uint8)])
    raise DataError(f"{where} is {given.dtype} {given.shape}, which is no form of labels that is known")
