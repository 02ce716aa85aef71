"""The imported graph beside ONNX Runtime on the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.network.batch import difference, noise
from dreamquant.network.front import as_fed
from dreamquant.network.onnx_import.interface import ImageInput
from dreamquant.runtime import session_options

TOLERANCE = 1e-3  # of 1 + the largest output: two float32 runtimes differ by 1e-6 a layer, a wrong attribute by much more


def verify(graph: fx.GraphModule, model: Path | bytes, path: str, given: ImageInput, batch: int) -> None:
    """Raise ModelError where `graph` and ONNX Runtime, running `model`, the file `path`, differ on noise (batch, C, H, W)."""
    images = noise(batch, given.shape)
    if given.dtype == "uint8":
        images = (images * 64 + 128).round().clamp(0, 255)
    elif given.dtype == "float16":
        images = images.half().float()
    expected = _run(model, path, as_fed(images, given.layout, getattr(torch, given.dtype)))
    with torch.no_grad():
        outputs = graph(images)
    actual = list(outputs) if isinstance(outputs, tuple) else [outputs]
    for position, (one, other) in enumerate(zip(expected, actual, strict=True)):
        error = difference(one, other)
        if not error <= TOLERANCE:
            raise ModelError(
                f"{path}: the imported network and ONNX Runtime disagree on noise: output {position} differs by "
                f"{error:.2g} of its largest value, {TOLERANCE:g} is allowed"
            )


def _run(model: Path | bytes, path: str, images: Tensor) -> list[Tensor]:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        given = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # ONNX Runtime's errors have no common base
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: ONNX Runtime cannot run it: {reason}") from error
    return [
        torch.as_tensor(output).float() if np.asarray(output).dtype == np.float16 else torch.as_tensor(output)
        for output in outputs
    ]
