"""Tensors as ONNX stores them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


def packed(values: Tensor, *, bits: int, signed: bool) -> TensorProto:
    """Whole numbers as an integer tensor of 16 or 8 bits, or of 4, two to a byte, the first in the lower half."""
    with np.errstate(invalid="ignore"):  # what is no number is found when the file is read back
        whole = array(values).astype(f"{'int' if signed else 'uint'}{bits}" if bits > 4 else np.int8)
    if bits > 4:
        return numpy_helper.from_array(whole)
    nibbles = whole.view(np.uint8).flatten() & 0xF
    low, high = nibbles[::2], np.pad(nibbles[1::2], (0, nibbles.size % 2))
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    return helper.make_tensor("", kind, list(values.shape), (low | high << 4).tobytes(), raw=True)


def array(value: Tensor) -> NDArray[Any]:
    """A tensor as numpy has it, whatever its device and strides."""
    return value.detach().cpu().contiguous().numpy()
