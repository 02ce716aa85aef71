"""What two files answered to the same images, counted batch by batch: how far outputs are apart, and who is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dreamquant.assess.evaluate import unread
from dreamquant.assess.labelled import LabelledImages
from dreamquant.assess.scoring import Score, class_scores, is_per_class, label_ranks, score_of, told_of
from dreamquant.assess.truths import CLASS, Truths
from dreamquant.errors import ModelError
from dreamquant.network.answers import agreement, divergence, unit
from dreamquant.network.outputs import CLASSES, FEW, VALUES, Output

_LEAST = 1e-7  # of a class's probability: what a float32 softmax still tells from nothing
_NORMAL = 1.959964  # standard deviations to each side that hold 95 % of a normal distribution

Array = NDArray[Any]


@dataclass(frozen=True)
class OutputError:
    """How far one output of `b` is from `a`'s, over all images and all values of the output together.

    `name` and `name_b` are what the files call it, `shape` is its shape with None for the axis of the images.

    - `relative_l2` is ||a - b|| / ||a||, a ratio; None where a is zero everywhere and b is not.
    - `sqnr` is 20 log10(||a|| / ||a - b||), in decibels; None where nothing differs or a is zero everywhere.
    - `largest` is the largest absolute difference of two values, in the output's own units.
    - `cosine` is that of the angle between a and b; None where one of them is zero everywhere.

    `kind` is that of the output (`network.outputs`), None where it is not known for certain, and `agreement` the percentage of
    `unit`, that kind's own, that b has of a's answers; None where the kind has no other than the error.

    For an output of one score per class, else None:

    - `top1` is the percentage of images with the same first class; among equal scores that with the lower number.
    - `kl` is the mean Kullback-Leibler divergence of b's probabilities from a's, in nats. Probabilities are the softmax of the
      scores, and the scores themselves where a file ends in a softmax, none below 1e-7.
    """

    name: str
    name_b: str
    shape: tuple[int | None, ...]
    relative_l2: float | None
    sqnr: float | None
    largest: float
    cosine: float | None
    kind: str | None
    agreement: float | None
    unit: str | None
    top1: float | None
    kl: float | None


@dataclass(frozen=True)
class PairedAccuracy:
    """Accuracy of both files on the same labelled images, by `output`, the first of classes that has those of the labels.

    The four accuracies are percentages of `images`. `difference` is `b_top1` - `a_top1` in points of percent; the interval
    from `low` to `high`, in points too, holds the true difference in 95 % of cases. `only_a` and `only_b` are how many images
    that file alone has right (top-1).
    """

    output: str
    images: int
    a_top1: float
    b_top1: float
    a_top5: float
    b_top5: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int


@dataclass(frozen=True)
class PairedWorth:
    """What both files are worth on the same labelled images, by one `output` of a kind: figures of `assess.scoring` by name, of a
    and of b."""

    output: str
    kind: str
    images: int
    figures: dict[str, tuple[float, float]]


class Tally:
    """Sums over the images of one output of two files, in double precision.

    `files` and `names` are what errors call the files and the output, of each file, `softmax` whether it gives probabilities,
    and `output` what is known of its kind.
    """

    def __init__(
        self, files: tuple[str, str], names: tuple[str, str], softmax: tuple[bool, bool], output: Output | None = None
    ) -> None:
        self.files, self.names, self.softmax, self.output = files, names, softmax, output
        self.counted, self.agreed = 0, 0.0
        self.shape: tuple[int | None, ...] | None = None
        self.signal, self.other, self.dot, self.noise, self.largest = 0.0, 0.0, 0.0, 0.0, 0.0
        self.scored, self.same, self.kl = 0, 0, 0.0

    def add(self, one: Array, other: Array, size: int) -> None:
        """Count the outputs of both files on `size` images; ModelError for those that cannot be compared."""
        self._check(one, other, size)
        if self.shape is None:
            self.shape = (None, *one.shape[1:]) if len(one) == size else one.shape
        if self.output is not None and self.output.kind != VALUES:
            x, y = (torch.from_numpy(np.ascontiguousarray(value)) for value in (one, other))
            self.counted += size
            self.agreed += size * agreement(self.output, x, y)
        if is_scores(one, size, self.output, any(self.softmax)):
            self._add_scores(one.reshape(size, -1), other.reshape(size, -1))
        a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
        difference = a - b
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.dot += float(a @ b)
        self.noise += float(difference @ difference)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))

    def _check(self, one: Array, other: Array, size: int) -> None:
        for file, name, output in zip(self.files, self.names, (one, other), strict=True):
            broken = output.size - int(np.isfinite(output).sum())
            if broken:
                raise ModelError(f"{broken} of the {output.size} values that {file} gives as {name} are NaN or infinite")
        if one.shape != other.shape:
            given = zip(self.files, self.names, (one, other), strict=True)
            said = " and ".join(f"{file} gives {name} {value.shape}" for file, name, value in given)
            raise ModelError(f"on the same {size} images {said}: they cannot be compared")

    def _add_scores(self, one: Array, other: Array) -> None:
        self.scored += len(one)
        self.same += int((one.argmax(1) == other.argmax(1)).sum())
        first, second = (_logits(scores, softmax) for scores, softmax in zip((one, other), self.softmax, strict=True))
        self.kl += len(one) * divergence(first, second)

    def result(self) -> OutputError:
        signal, other, noise = (math.sqrt(value) for value in (self.signal, self.other, self.noise))
        return OutputError(
            *self.names,
            shape=self.shape or (),
            relative_l2=noise / signal if signal else None if noise else 0.0,
            sqnr=20 * math.log10(signal / noise) if signal and noise else None,
            largest=self.largest,
            cosine=max(-1.0, min(1.0, self.dot / signal / other)) if signal and other else None,
            kind=None if self.output is None else self.output.kind,
            agreement=self.agreed / self.counted if self.counted else None,
            unit=unit(self.output) if self.output is not None and self.counted else None,
            top1=100 * self.same / self.scored if self.scored else None,
            kl=self.kl / self.scored if self.scored else None,
        )


def is_scores(output: Array, size: int, known: Output | None = None, softmax: bool = False) -> bool:
    """Whether an output on `size` images is one score for each of at least two classes: what is known to be, else what has the
    shape, and a softmax or more numbers than a point or a box."""
    if output.dtype.kind != "f" or not is_per_class(output, size) or output.shape[1] < 2:
        return False
    return softmax or output.shape[1] > FEW if known is None else known.kind == CLASSES


def _logits(scores: Array, softmax: bool) -> torch.Tensor:
    """Scores whose softmax are the probabilities."""
    values = scores.astype(np.float64)
    return torch.from_numpy(np.log(np.maximum(values, _LEAST)) if softmax else values)


class Ranks:
    """How many classes each file puts before the labelled one, image by image; labels go up to `highest`."""

    def __init__(self, highest: int, tallies: Sequence[Tally]) -> None:
        self.highest, self.tallies = highest, tallies
        self.place: int | None = None  # of the first output of class scores
        self.ranks: tuple[list[Array], list[Array]] = ([], [])

    def add(self, values: Sequence[tuple[Array, Array]], labels: NDArray[np.int64]) -> None:
        """Rank the labels in the pairs of outputs on as many images; DataError where there is no such class."""
        if self.place is None:
            able = [
                place
                for place, ((one, _), tally) in enumerate(zip(values, self.tallies, strict=True))
                if is_scores(one, len(labels), tally.output, softmax=tally.output is None)  # labels say that there are classes
            ]
            self.place = next((place for place in able if values[place][0].shape[1] > self.highest), next(iter(able), None))
        if self.place is None:
            return
        for ranks, output in zip(self.ranks, values[self.place], strict=True):
            ranks.append(label_ranks(class_scores(output, count=len(labels), highest=self.highest), labels))

    def result(self) -> PairedAccuracy | None:
        if self.place is None:
            return None
        a, b = (np.concatenate(ranks) for ranks in self.ranks)
        only_a, only_b = int(((a < 1) & (b >= 1)).sum()), int(((b < 1) & (a >= 1)).sum())
        low, high = paired_interval(only_a, only_b, len(a))
        return PairedAccuracy(
            output=self.tallies[self.place].names[0],
            images=len(a),
            a_top1=_percent(a < 1),
            b_top1=_percent(b < 1),
            a_top5=_percent(a < 5),
            b_top5=_percent(b < 5),
            difference=100 * (only_b - only_a) / len(a),
            low=low,
            high=high,
            only_a=only_a,
            only_b=only_b,
        )


class Worths:
    """How good both files' answers are by the labels of `data`, of whatever form; `known` is what is known of the outputs, in
    order."""

    def __init__(
        self,
        data: LabelledImages,
        known: Sequence[Output | None],
        input_shape: tuple[int, int, int],
        name: str,
        blank: int | None,
    ) -> None:
        self.truths = data.truths or Truths(CLASS, data.labels.tolist())
        self.resize, self.size, self.blank = data.resize, (input_shape[2], input_shape[1]), blank
        self.known, self.name = known, name
        self.place, self.images = -1, 0
        self.scores: list[Score] = []

    def add(self, values: Sequence[tuple[Array, Array]], labels: NDArray[np.int64]) -> None:
        """Count the pairs of outputs on as many images; DataError for labels that tell of none of them."""
        if not self.scores:
            guessed = unread([torch.from_numpy(one) for one, _ in values])
            outputs = [known or guess for known, guess in zip(self.known, guessed, strict=True)]
            self.place, output = told_of(outputs, self.truths.form, self.name)
            self.scores = [score_of(output, self.size, self.resize, self.truths.each, self.blank) for _ in range(2)]
        told = self.truths.each[self.images : self.images + len(labels)]
        for score, answers in zip(self.scores, values[self.place], strict=True):
            score.add(torch.from_numpy(np.ascontiguousarray(answers)), told)
        self.images += len(labels)

    def result(self) -> PairedWorth:
        output = self.scores[0].output
        a, b = (score.result() for score in self.scores)
        return PairedWorth(output.name, output.kind, self.images, {name: (a[name], b[name]) for name in a})


def _percent(right: Array) -> float:
    return 100 * int(right.sum()) / len(right)


def paired_interval(only_a: int, only_b: int, images: int) -> tuple[float, float]:
    """95 % interval of b's accuracy minus a's, in points, where each has so many of the images right that the other has not.

    The standard error is that of paired answers, as in McNemar's test, with one more image in each of the two counts (Bonett and
    Price, Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data, 2012), so that files
    which answer a few images alike are not taken to do so always.
    """
    lost, won = (only_a + 1) / (images + 2), (only_b + 1) / (images + 2)
    half = _NORMAL * math.sqrt((lost + won - (won - lost) ** 2) / (images + 2))
    return 100 * max(-1.0, won - lost - half), 100 * min(1.0, won - lost + half)
