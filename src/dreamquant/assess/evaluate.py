"""Accuracy on labelled images, of anything that turns a batch into scores: a network, or a file in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from dreamquant.assess.labelled import LabelledImages
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network.graph import Network
from dreamquant.network.input_space import InputSpace, Statement, of_properties, stated
from dreamquant.network.load import Loading, load
from dreamquant.network.outputs import main_output
from dreamquant.runtime import onnx_runner

Run = Callable[[NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True)
class Runnable:
    """What can be evaluated: `run` maps images (n, C, H, W) of `input_shape`, normalised with `mean` and `std`, to scores."""

    run: Run
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = ""


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
        raise DataError("the classes of the images are not known, and accuracy needs them")
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


def runnable(model: str, **loading: Unpack[Loading]) -> Runnable:
    """What `model` names: an ONNX file, quantized or not, as it is in ONNX Runtime, anything else as the network that it is.

    Options are as in `load`. Raises what `load` and `onnx_runner` do, and OptionError where nobody has told the size of the
    images or how their pixels are normalised.
    """
    run: Run
    if model.endswith(".onnx"):
        numbers = loading.get("mean") or None, loading.get("std") or None
        statement = Statement(*numbers, loading.get("pixels"), loading.get("layout"), loading.get("channels"))
        run = runner = onnx_runner(Path(model), layout=statement.layout)
        input_shape = loading.get("input_shape") or _known_shape(runner.input_shape, model)
        found = stated(statement, input_shape[0], model) or of_properties(runner.metadata, input_shape[0])
        space = replace(found or InputSpace(), channels=statement.channels or (found.channels if found else ""))
    else:
        network = load(model, **loading)
        run, input_shape, space = torch_runner(network), network.input_shape, network.space
    check_normalised(model, space.mean, space.std)
    return Runnable(run, input_shape, space.mean, space.std, space.channels)


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

    def run(images: NDArray[np.float32]) -> NDArray[Any]:
        with torch.inference_mode():
            return network.answers(torch.from_numpy(images))[place].numpy()

    return run
