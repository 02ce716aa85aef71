"""What answers are worth on labelled images, of anything that gives some to a batch: a network, or a file in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamquant.assess.labelled import LabelledImages
from dreamquant.assess.scoring import Score, class_scores, label_ranks, score_of, told_of
from dreamquant.assess.truths import CLASS, Truths
from dreamquant.devices import CPU
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network import output_properties
from dreamquant.network.graph import Network, by_image
from dreamquant.network.input_space import InputSpace, Statement, of_properties, stated
from dreamquant.network.load import Loading, load
from dreamquant.network.outputs import CLASSES, SHAPE, VALUES, Output, main_output
from dreamquant.runtime import OnnxRunner, onnx_runner

Run = Callable[[NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True)
class Runnable:
    """What can be evaluated: `answers` maps images (n, C, H, W) of `input_shape`, normalised with `mean` and `std`, to all
    outputs, each (n, ...). `outputs` are what is known of these, empty where nothing is."""

    name: str
    answers: Callable[[NDArray[np.float32]], list[Tensor]]
    outputs: tuple[Output, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = ""

    def run(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """The first output of classes, else the first output."""
        return self.answers(images)[main_output(self.outputs)].numpy()


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a network on labelled images.

    `top1` and `top5` are percentages of `images`; among equal scores the class with the lower number comes first, as in
    `argmax`, and with fewer than five classes `top5` is 100. `seconds` is the time of inference alone, without the
    decoding of images. `predictions` is int64 (images,).
    """

    top1: float
    top5: float
    images: int
    seconds: float
    predictions: NDArray[np.int64] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Judgement:
    """What one output of a network is worth on labelled images: `figures` by name, the one that counts first, those of
    `assess.scoring` for the `kind`. `seconds` is the time of inference alone."""

    output: str
    kind: str
    figures: dict[str, float]
    images: int
    seconds: float


def judge(
    subject: Runnable,
    data: LabelledImages,
    *,
    blank: int | None = None,
    batch: int = 64,
    callback: Callable[[int, int], None] | None = None,
) -> Judgement:
    """What a network is worth by the labels of `data`, of whatever form they are: by the output that these tell of.

    `blank` is the class of a sequence that stands for nothing; without it, it is that of the first and the last which is no
    label. `callback` is as in `evaluate`. Raises DataError for labels that no output is told of by, or that do not fit it;
    OptionError for impossible options, and where boxes are to be counted without pycocotools; ModelError for answers that are not
    numbers.
    """
    truths = data.truths or Truths(CLASS, data.labels.tolist())
    if len(data) == 0 or (truths.form == CLASS and data.labels.min() < 0):
        raise DataError("nobody has told what is true of the images, so answers cannot be held against it")
    chosen: tuple[int, Score] | None = None
    seconds, done = 0.0, 0
    shape, channels = subject.input_shape, subject.channels
    for images, _ in data.batches(batch, input_shape=shape, mean=subject.mean, std=subject.std, channels=channels):
        began = time.perf_counter()
        answers = subject.answers(images)
        seconds += time.perf_counter() - began
        if chosen is None:
            place, output = told_of(subject.outputs or unread(answers), truths.form, subject.name)
            chosen = place, score_of(output, (shape[2], shape[1]), data.resize, truths.each, blank)
        place, score = chosen
        if not bool(torch.isfinite(answers[place]).all()):
            raise ModelError(f"{subject.name} gives numbers that are NaN or infinite")
        score.add(answers[place], truths.each[done : done + len(images)])
        done += len(images)
        if callback is not None:
            callback(done, len(data))
    assert chosen is not None
    return Judgement(chosen[1].output.name, chosen[1].output.kind, chosen[1].result(), done, seconds)


def asks_for_accuracy(subject: Runnable, data: LabelledImages) -> bool:
    """Whether labels are classes, and those of an output of classes: then `evaluate` tells the accuracy."""
    return data.truths is None and (not subject.outputs or told_of(subject.outputs, CLASS, subject.name)[1].kind == CLASSES)


def unread(answers: Sequence[Tensor]) -> list[Output]:
    """What is known of the outputs of a file that cannot be read: their answers (N, ...)."""
    forms = ["sigmoid" if bool(((value >= 0) & (value <= 1)).all()) else "logits" for value in answers]
    shapes = [tuple(value.shape[1:]) for value in answers]
    return [
        Output(f"output {number}", VALUES, SHAPE, "its shape", 0, shape, form)
        for number, (shape, form) in enumerate(zip(shapes, forms, strict=True))
    ]


def evaluate(
    run: Run,
    data: LabelledImages,
    *,
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channels: str = "",
    batch: int = 64,
    callback: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Top-1 and top-5 accuracy of `run`, which maps float32 (n, C, H, W) to scores (n, classes), on all of `data`.

    Images are prepared by `LabelledImages.batches`; `callback` hears (images done, images in all) after each batch.
    Raises OptionError for a wrong `batch`, `mean` or `std`; DataError when a label is not below the number of outputs,
    when the output is not one score per class, and for broken images; ModelError when scores are not numbers.
    """
    if len(data) == 0:
        raise DataError("there are no labelled images to evaluate on")
    if data.labels.min() < 0:
        told = "not known" if data.truths is None else f"not told by labels that are {data.truths.form}"
        raise DataError(f"the classes of the images are {told}, and accuracy needs them")
    predictions: list[NDArray[np.int64]] = []
    ranks: list[NDArray[np.int64]] = []
    seconds, done = 0.0, 0
    for images, labels in data.batches(batch, input_shape=input_shape, mean=mean, std=std, channels=channels):
        began = time.perf_counter()
        output = run(images)
        seconds += time.perf_counter() - began
        scores = class_scores(output, count=len(images), highest=int(data.labels.max()))
        predictions.append(scores.argmax(axis=1))
        ranks.append(label_ranks(scores, labels))
        done += len(images)
        if callback is not None:
            callback(done, len(data))
    rank = np.concatenate(ranks)
    top1, top5 = (100 * int((rank < k).sum()) / len(data) for k in (1, 5))
    return Evaluation(top1, top5, len(data), seconds, np.concatenate(predictions))


def runnable(model: str, **loading: Unpack[Loading]) -> Runnable:
    """What `model` names: an ONNX file, quantized or not, as it is in ONNX Runtime, anything else as the network that it is.

    Options are as in `load`. Raises what `load` and `onnx_runner` do, and OptionError where nobody has told the size of the
    images or how their pixels are normalised.
    """
    if model.endswith(".onnx"):
        numbers = loading.get("mean") or None, loading.get("std") or None
        statement = Statement(*numbers, loading.get("pixels"), loading.get("layout"), loading.get("channels"))
        runner = onnx_runner(Path(model), layout=statement.layout)
        input_shape = loading.get("input_shape") or _known_shape(runner.input_shape, model)
        found = stated(statement, input_shape[0], model) or of_properties(runner.metadata, input_shape[0])
        space = replace(found or InputSpace(), channels=statement.channels or (found.channels if found else ""))
        outputs = known_outputs(runner, input_shape, loading.get("outputs") or {})
        runner = runner.looked_into([output.name for output in outputs])
        answers = partial(_file_answers, runner, outputs)
    else:
        loading.setdefault("device", CPU)
        network = load(model, **loading)
        answers, input_shape, space, outputs = partial(_answers, network), network.input_shape, network.space, network.outputs
    check_normalised(model, space.mean, space.std)
    return Runnable(model, answers, outputs, input_shape, space.mean, space.std, space.channels)


def known_outputs(runner: OnnxRunner, input_shape: tuple[int, int, int], stated: Mapping[str, str]) -> tuple[Output, ...]:
    """The outputs of a file as it stores them, or as they are found in it; none for a file that is quantized by another tool, and
    cannot be read.

    `stated` are kinds of outputs by name; `OptionError` where nothing can be held against them.
    """
    told = output_properties.names_of(runner.metadata)
    stored = output_properties.of_properties(runner.metadata, list(runner.looked_into(told).outputs))
    if stored is not None and not stated:
        return stored
    try:
        return load(runner.name, input_shape=input_shape, layout=runner.layout, outputs=stated, device=CPU).outputs
    except ModelError as error:
        if stated:
            raise OptionError(f"kinds of outputs are stated, and cannot be held against the file: {error}") from error
        return ()


def _known_shape(shape: tuple[int | None, int | None, int | None], model: str) -> tuple[int, int, int]:
    channels, height, width = shape
    if channels is None or height is None or width is None:
        raise OptionError(f"{model} leaves the size of its images open: give --input-shape C,H,W")
    return channels, height, width


def check_normalised(model: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise OptionError unless it is known how the pixels that `model` takes are normalised."""
    if not mean or not std:
        raise OptionError(f"{model} does not store how pixels are normalised: give --mean and --std, or --pixels")


def torch_runner(network: Network) -> Run:
    """A network as a function over numpy batches: float32 (n, C, H, W) -> its first output of classes, else its first output."""
    place = main_output(network.outputs)
    return lambda images: _answers(network, images)[place].numpy()


def _answers(network: Network, images: NDArray[np.float32]) -> list[Tensor]:
    with torch.inference_mode():
        return [value.cpu() for value in network.answers(torch.from_numpy(images))]


def _file_answers(runner: OnnxRunner, outputs: Sequence[Output], images: NDArray[np.float32]) -> list[Tensor]:
    """All outputs of a file, (n, ...)."""
    values = [torch.from_numpy(value) for value in runner.all(images)]
    if outputs:
        return by_image(values, outputs, len(images))
    return [value.movedim(axis, 0) for value, axis in zip(values, runner.axes.values(), strict=True)]
