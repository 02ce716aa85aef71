"""Accuracy on labelled images, of anything that turns a batch into scores: a network, or a file in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from dreamquant.assess.labelled import LabelledImages
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network.graph import Network

Run = Callable[[NDArray[np.float32]], NDArray[Any]]

_ERRORS_ONLY = 3
_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


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
    predictions: list[NDArray[np.int64]] = []
    ranks: list[NDArray[np.int64]] = []
    seconds, done = 0.0, 0
    for images, labels in data.batches(batch, input_shape=input_shape, mean=mean, std=std):
        began = time.perf_counter()
        output = run(images)
        seconds += time.perf_counter() - began
        scores = _scores(output, count=len(images), highest=int(data.labels.max()))
        predictions.append(scores.argmax(axis=1))
        ranks.append(_ranks(scores, labels))
        done += len(images)
        if callback is not None:
            callback(done, len(data))
    rank = np.concatenate(ranks)
    top1, top5 = (100 * int((rank < k).sum()) / len(data) for k in (1, 5))
    return Evaluation(top1, top5, len(data), seconds, np.concatenate(predictions))


def _scores(output: NDArray[Any], *, count: int, highest: int) -> NDArray[Any]:
    """The output as (count, classes), if it is one score per class, a number each, and has a class `highest`."""
    if output.ndim < 2 or len(output) != count or output.size != count * output.shape[1]:
        raise DataError(f"{count} images gave an output of shape {output.shape}, which is not one score per class")
    scores = output.reshape(count, -1)
    if highest >= scores.shape[1]:
        raise DataError(
            f"the labels go up to {highest}, the network has {scores.shape[1]} outputs, 0 to {scores.shape[1] - 1}"
        )
    broken = int(np.isnan(scores).any(axis=1).sum())
    if broken:
        raise ModelError(f"the network's scores are not numbers (NaN) on {broken} of {count} images")
    return scores


def _ranks(scores: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the labelled one, 0 for none; equal scores go by class number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    before: NDArray[np.int64] = ((scores > own) | ((scores == own) & lower)).sum(axis=1)
    return before


class OnnxRunner:
    """An ONNX file in ONNX Runtime on the processor: float32 (n, C, H, W) -> its first output.

    `input_shape` is (C, H, W) with None where the file leaves it open, `batch` the only batch size it takes or None for
    any, `metadata` its custom properties. A file of one batch size is fed in pieces, the last one filled up.
    """

    def __init__(self, source: Path | bytes, *, threads: int | None, optimize: bool) -> None:
        self.name = "the ONNX model" if isinstance(source, bytes) else str(source)
        self.session = _session(source, self.name, threads, optimize)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            given = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
            raise ModelError(f"{self.name} takes {given or 'no input'}, not one float32 batch of images (N, C, H, W)")
        self.input_name: str = inputs[0].name
        self.output_name: str = self.session.get_outputs()[0].name
        batch, channels, height, width = (
            size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape
        )
        self.batch: int | None = batch
        self.input_shape: tuple[int | None, int | None, int | None] = (channels, height, width)
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """The first output on images (n, C, H, W), n at least 1; ModelError where the runtime refuses them."""
        step = self.batch or len(images)
        return np.concatenate([self._piece(images[i : i + step], step) for i in range(0, len(images), step)])

    def _piece(self, images: NDArray[np.float32], size: int) -> NDArray[Any]:
        count = len(images)
        if count < size:
            images = np.concatenate([images, np.repeat(images[:1], size - count, axis=0)])
        with refusals(f"{self.name} does not run"):
            output: NDArray[Any] = self.session.run([self.output_name], {self.input_name: images})[0]
        return output[:count]


def onnx_runner(source: Path | bytes, *, threads: int | None = None, optimize: bool = True) -> OnnxRunner:
    """An ONNX file, or its bytes, ready to run on the processor.

    `threads` is the number of threads inside one operator, None for the runtime's own choice; with `optimize` off the
    graph is run as it is written. Raises ModelError when the file is missing, corrupt, not supported by the runtime, or
    takes anything but one float32 batch of images; OptionError when `threads` is below 1.
    """
    return OnnxRunner(source, threads=threads, optimize=optimize)


def torch_runner(network: Network) -> Run:
    """A network as a function over numpy batches: float32 (n, C, H, W) -> its first output, without gradients."""

    def run(images: NDArray[np.float32]) -> NDArray[Any]:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return run


def _session(source: Path | bytes, name: str, threads: int | None, optimize: bool) -> onnxruntime.InferenceSession:
    if threads is not None and threads < 1:
        raise OptionError(f"{threads} threads are impossible, it must be at least 1")
    if isinstance(source, Path) and not source.is_file():
        raise ModelError(f"there is no file {source}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with refusals(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}"):
        given = source if isinstance(source, bytes) else str(source)
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors into a ModelError of one line that begins with `what`."""
    try:
        yield
    except _RUNTIME_ERRORS as error:
        raise ModelError(f"{what}: {' '.join(str(error).split())}") from error
