"""How good answers are where the truth is known, by the kind of output: a class a kind, which counts batch by batch.

What is true of an image, and what is told of all, is, by kind,

    classes               the number of its class: the share with it first, and among the first five
    features              the same: the share whose nearest other image, by cosine, is of its class
    multilabel            the numbers of its classes: F1 of all labels together
    sequence classes      the numbers of its classes, in order: the share that is read without an error, and errors a class
    dense classes         a mask: the mean intersection over union of the classes that are there or found
    regions               `TrueBoxes`: the mean average precision, as COCO counts it
    values                numbers, as many as the answer has: the mean absolute error

Figures are in percent, and the better the higher, but for those that are called errors.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dreamquant.assess.labelled import placed, resized
from dreamquant.assess.truths import BOXES, CLASS, LISTS, MASKS, NUMBERS, Mask, TrueBoxes
from dreamquant.errors import DataError, ModelError, OptionError, reason
from dreamquant.network.boxes import are_corners, find_boxes
from dreamquant.network.outputs import CLASSES, DENSE, FEATURES, MULTILABEL, REGIONS, SEQUENCE, VALUES, Output

IGNORED = 255  # of a mask: the class of pixels that do not count, as PASCAL VOC and Cityscapes have it
SEEN = 0.001  # the least confidence of a box that counts for the mean average precision
TOGETHER = 1024  # images whose neighbours are looked for at once


class Score:
    """Counts how good the answers (N, ...) of one output are, to images brought to `size` (width, height) by `resize`."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        self.output, self.size, self.resize = output, size, resize

    def add(self, answers: Tensor, truth: Sequence[Any]) -> None:
        """Count the answers to as many images as `truth` tells of; `DataError` for a truth that cannot be of such an answer."""
        raise NotImplementedError

    def result(self) -> dict[str, float]:
        """The figures, the one that counts first."""
        raise NotImplementedError

    def check(self, highest: int) -> None:
        """`DataError` unless there is a class of that number."""
        classes = self.output.shape[self.output.places - 1] if self.output.shape else 1
        known = max(classes, 2) if self.output.kind in (CLASSES, DENSE) else classes
        if highest >= known:
            raise DataError(f"the labels go up to {highest}, and {self.output.name} tells {known} classes, 0 to {known - 1}")

    def holds(self, answers: Tensor) -> Tensor:
        """Whether each label holds, by the border of its form."""
        return answers > (0.5 if self.output.form == "sigmoid" else 0.0)


class First(Score):
    """The share of images with the true class first, and among the first five."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.ranks: list[NDArray[np.int64]] = []

    def add(self, answers: Tensor, truth: Sequence[int]) -> None:
        scores = class_scores(answers.numpy(), count=len(truth), highest=max(truth))
        self.ranks.append(label_ranks(scores, np.array(truth, np.int64)))

    def result(self) -> dict[str, float]:
        rank = np.concatenate(self.ranks)
        return {f"top-{k}": 100 * int((rank < k).sum()) / len(rank) for k in (1, 5)}


class Labels(Score):
    """F1 of labels, all images and classes together."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.both = self.told = self.true = 0

    def add(self, answers: Tensor, truth: Sequence[Sequence[int]]) -> None:
        self.check(max((max(labels, default=0) for labels in truth), default=0))
        expected = torch.zeros(answers.shape, dtype=torch.bool)
        for row, labels in zip(expected, truth, strict=True):
            row[list(labels)] = True
        found = self.holds(answers)
        self.both += int((found & expected).sum())
        self.told += int(found.sum())
        self.true += int(expected.sum())

    def result(self) -> dict[str, float]:
        return {"F1": 200 * self.both / max(self.told + self.true, 1)}


class Pixels(Score):
    """Mean intersection over union of classes, over the pixels of all images together, and the share that is right."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.classes = max(output.shape[0], 2)
        self.counts = torch.zeros(self.classes, self.classes, dtype=torch.int64)  # of pixels, by true class and by found one

    def add(self, answers: Tensor, truth: Sequence[Mask]) -> None:
        found = answers.argmax(1) if answers.shape[1] > 1 else self.holds(answers)[:, 0].long()
        fitted = [resized(mask(), *self.size, self.resize, Image.Resampling.NEAREST, IGNORED) for mask in truth]
        masks = torch.from_numpy(np.stack([np.asarray(mask) for mask in fitted])).float().unsqueeze(1)
        expected = F.interpolate(masks, found.shape[1:], mode="nearest-exact").squeeze(1).long()
        counted = expected != IGNORED
        self.check(int(expected[counted].max()) if bool(counted.any()) else 0)
        pairs = expected[counted] * self.classes + found[counted]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def result(self) -> dict[str, float]:
        right, union = self.counts.diagonal(), self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        there = union > 0
        shares = right[there].double() / union[there]
        return {
            "mean IoU": 100 * shares.mean().item() if len(shares) else math.nan,
            "pixels": 100 * right.sum().item() / max(self.counts.sum().item(), 1),
        }


class Neighbours(Score):
    """The share of images whose nearest other image, by the cosine of their features, has the same class."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.vectors: list[Tensor] = []
        self.labels: list[int] = []

    def add(self, answers: Tensor, truth: Sequence[int]) -> None:
        self.vectors.append(F.normalize(answers.flatten(1), dim=1))
        self.labels += truth

    def result(self) -> dict[str, float]:
        vectors, labels = torch.cat(self.vectors), torch.tensor(self.labels)
        if len(labels) < 2:
            raise DataError("features are told by the class of the nearest other image, and there is one image")
        right = 0
        for start in range(0, len(labels), TOGETHER):
            alike = vectors[start : start + TOGETHER] @ vectors.T
            alike.diagonal(start).fill_(-2)  # none is its own neighbour
            right += int((labels[alike.argmax(1)] == labels[start : start + TOGETHER]).sum())
        return {"nearest neighbour": 100 * right / len(labels)}


class Readings(Score):
    """Sequences read greedily, as connectionist temporal classification has them: repeats are one, and blanks are left out."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str, blank: int) -> None:
        super().__init__(output, size, resize)
        self.blank = blank
        self.lines = self.right = self.errors = self.length = 0

    def add(self, answers: Tensor, truth: Sequence[Sequence[int]]) -> None:
        self.check(max((max(labels, default=0) for labels in truth), default=0))
        for line, labels in zip(answers.argmax(self.output.places), truth, strict=True):
            read = [int(one) for one in torch.unique_consecutive(line) if one != self.blank]
            errors = edits(read, labels)
            self.lines, self.right = self.lines + 1, self.right + (errors == 0)
            self.errors, self.length = self.errors + errors, self.length + len(labels)

    def result(self) -> dict[str, float]:
        return {"read": 100 * self.right / self.lines, "errors a class": 100 * self.errors / max(self.length, 1)}


class Errors(Score):
    """The mean absolute error of numbers."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.error, self.count = 0.0, 0

    def add(self, answers: Tensor, truth: Sequence[NDArray[Any]]) -> None:
        expected = torch.from_numpy(np.stack(truth)).double()
        if expected[0].numel() != answers[0].numel():
            raise DataError(
                f"there are {expected[0].numel()} numbers for an image, and {self.output.name} tells {answers[0].numel()}"
            )
        self.error += (answers.double().flatten(1) - expected.flatten(1)).abs().sum().item()
        self.count += expected.numel()

    def result(self) -> dict[str, float]:
        return {"mean absolute error": self.error / max(self.count, 1)}


class Boxes(Score):
    """Mean average precision of boxes, by the means of COCO itself; boxes of one class that overlap a surer one do not count."""

    def __init__(self, output: Output, size: tuple[int, int], resize: str) -> None:
        super().__init__(output, size, resize)
        self.coco, self.evaluation = _pycocotools("coco"), _pycocotools("cocoeval")
        self.corners: bool | None = None
        self.truth: list[TrueBoxes] = []
        self.found: list[tuple[float, ...]] = []

    def add(self, answers: Tensor, truth: Sequence[TrueBoxes]) -> None:
        self.corners = are_corners(self.output, answers) if self.corners is None else self.corners
        for value, true in zip(answers, truth, strict=True):
            corners, classes, scores = find_boxes(self.output, value, SEEN, self.corners)
            scale, shift = (torch.tensor(pair).repeat(2) for pair in placed(true.size, self.size, self.resize))
            left, top, right, bottom = ((corners - shift) / scale).unbind(1)
            known = classes < len(true.categories)  # a class that no category is of cannot be right
            sides = torch.stack([left, top, right - left, bottom - top], 1)[known].tolist()
            rows = zip(sides, scores[known].tolist(), classes[known].tolist(), strict=True)
            self.found += [(len(self.truth), *box, score, true.categories[kind]) for box, score, kind in rows]
            self.truth.append(true)

    def result(self) -> dict[str, float]:
        if not self.found:
            return {"mAP": 0.0, "mAP at IoU 0.5": 0.0}
        with redirect_stdout(io.StringIO()):
            expected = self.coco.COCO()
            expected.dataset = self._dataset()
            expected.createIndex()
            counted = self.evaluation.COCOeval(expected, expected.loadRes(np.array(self.found)), "bbox")
            counted.evaluate()
            counted.accumulate()
            counted.summarize()
        return {"mAP": 100 * float(counted.stats[0]), "mAP at IoU 0.5": 100 * float(counted.stats[1])}

    def _dataset(self) -> dict[str, Any]:
        boxes = [(image, one) for image, true in enumerate(self.truth) for one in true.annotations]
        annotations = [
            {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} | dict(one) | {"id": number, "image_id": image}
            for number, (image, one) in enumerate(boxes, 1)
        ]
        categories = sorted({one for true in self.truth for one in true.categories})
        return {
            "images": [{"id": image} for image in range(len(self.truth))],
            "annotations": annotations,
            "categories": [{"id": one} for one in categories],
        }


SUITED = {  # the kinds of output that labels of a form can tell of, the likeliest first
    CLASS: (CLASSES, FEATURES),
    LISTS: (SEQUENCE, MULTILABEL),
    MASKS: (DENSE,),
    BOXES: (REGIONS,),
    NUMBERS: (VALUES,),
}
RANKS = {CLASSES: 2, MULTILABEL: 2, DENSE: 4, SEQUENCE: 3}  # axes that the answers of a kind have
SCORES: dict[str, type[Score]] = {
    CLASSES: First,
    FEATURES: Neighbours,
    MULTILABEL: Labels,
    DENSE: Pixels,
    REGIONS: Boxes,
    VALUES: Errors,
}


def told_of(outputs: Sequence[Output], form: str, name: str) -> tuple[int, Output]:
    """The output that labels of a form tell of, and its place.

    Where the kind of an output is only guessed by its shape, the labels say it better. `DataError` where there is none.
    """
    for kind in SUITED[form]:
        for place, output in enumerate(outputs):
            if output.kind == kind and output.certain:
                return place, output
    for kind in SUITED[form]:
        for place, output in enumerate(outputs):
            if not output.certain and kind != REGIONS and RANKS.get(kind, 1 + len(output.shape)) == 1 + len(output.shape):
                places = len(output.shape) if kind == SEQUENCE else 1
                return place, replace(output, kind=kind, why=f"labels that are {form}", places=places)
    listed = "; ".join(f"{output.name}: {output.kind}" for output in outputs)
    raise DataError(f"the labels are {form}, and {name} has no output of {' or '.join(SUITED[form])} (it has: {listed})")


def score_of(output: Output, size: tuple[int, int], resize: str, truth: Sequence[Any], blank: int | None = None) -> Score:
    """What counts how good the answers of an output are, to images whose `truth` is told. `blank` is the class of a sequence that
    stands for nothing; where it is not told it is found."""
    if output.kind == SEQUENCE:
        classes = output.shape[output.places - 1]
        if blank is not None and not 0 <= blank < classes:
            raise OptionError(f"the blank is {blank}, and {output.name} tells {classes} classes, 0 to {classes - 1}")
        return Readings(output, size, resize, _blank(output, truth) if blank is None else blank)
    if blank is not None:
        raise OptionError(f"a blank is of sequences, and {output.name} is {output.kind}")
    return SCORES[output.kind](output, size, resize)


def _blank(output: Output, truth: Sequence[Sequence[int]]) -> int:
    """The first or the last class: that of the two which no label is."""
    last = output.shape[output.places - 1] - 1
    free = [place for place in (0, last) if not any(place in labels for labels in truth)]
    if len(free) != 1:
        told = "neither is a label" if free else "both are labels"
        raise OptionError(f"of the classes 0 and {last} {told}, so it is not known which of them is the blank: give --blank")
    return free[0]


def class_scores(output: NDArray[Any], *, count: int, highest: int) -> NDArray[Any]:
    """The output as (count, classes), if it is one score per class, a number each, and has a class `highest`; DataError or
    ModelError if not."""
    if not is_per_class(output, count):
        raise DataError(f"{count} images gave an output of shape {output.shape}, which is not one score per class")
    scores = output.reshape(count, -1)
    if highest >= scores.shape[1]:
        raise DataError(f"the labels go up to {highest}, the network has {scores.shape[1]} outputs, 0 to {scores.shape[1] - 1}")
    broken = int(np.isnan(scores).any(axis=1).sum())
    if broken:
        raise ModelError(f"the network's scores are not numbers (NaN) on {broken} of {count} images")
    return scores


def is_per_class(output: NDArray[Any], count: int) -> bool:
    """Whether an output on `count` images is one number per class, (count, classes) or with axes of length 1 behind."""
    return output.ndim >= 2 and len(output) == count and output.size == count * output.shape[1]


def label_ranks(scores: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the labelled one, 0 for none; equal scores go by class number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    before: NDArray[np.int64] = ((scores > own) | ((scores == own) & lower)).sum(axis=1)
    return before


def edits(one: Sequence[int], other: Sequence[int]) -> int:
    """The fewest insertions, deletions and replacements that make one sequence the other (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _pycocotools(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"pycocotools.{name}")
    except ImportError as error:
        needed = f"boxes are counted by pycocotools, which cannot be imported ({reason(error)})"
        raise OptionError(f"{needed}: pip install 'dreamquant[coco]'") from error
