"""Samples as the calibration input of other quantizers: ONNX Runtime's `quantize_static`, NNCF's `quantize`."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader

from dreamquant.errors import OptionError
from dreamquant.samples import Samples


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime is not typed
    """Samples as `onnxruntime.quantization` reads them: batches {`input_name`: float32 (n, C, H, W)}, in order.

    `input_name` is that of the ONNX file's input, `batch` the images in one run of it; the last run may get fewer, so for a
    file of one batch size the number of images must be a multiple of it. Raises OptionError for an empty name and a batch
    that is impossible.
    """

    def __init__(self, samples: Samples, input_name: str, batch: int = 1) -> None:
        if not input_name:
            raise OptionError("the name of the ONNX file's input is empty; a runtime knows an input by its name only")
        self._name, self._batches = input_name, _batches(samples, batch)
        self.rewind()

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, None after the last."""
        if self._next >= self._end:
            return None
        self._next += 1
        return {self._name: self._batches[self._next - 1]}

    def rewind(self) -> None:
        """Begin again with the first batch."""
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the batches from `start_index` up to `end_index` next, and then no more."""
        self._next, self._end = start_index, min(end_index, len(self))


def nncf_dataset(samples: Samples, input_name: str | None = None, *, batch: int = 1) -> Any:
    """Samples as an `nncf.Dataset`.

    With an `input_name` its items are {name: float32 (n, C, H, W)}, for ONNX models; without one they are tensors, for
    PyTorch's. Raises OptionError when NNCF cannot be imported and for a batch that is impossible.
    """
    try:
        nncf = importlib.import_module("nncf")
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"a dataset for NNCF needs nncf, which cannot be imported ({reason}): pip install 'dreamquant[nncf]'"
        ) from error
    if input_name is None:
        _check_batch(batch)
        return nncf.Dataset(list(torch.split(samples.images, batch)))
    return nncf.Dataset(list(CalibrationReader(samples, input_name, batch)))


def _batches(samples: Samples, batch: int) -> list[NDArray[np.float32]]:
    _check_batch(batch)
    return [images.contiguous().numpy() for images in torch.split(samples.images, batch)]


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise OptionError(f"a batch of {batch} images is impossible, it must be at least 1")
