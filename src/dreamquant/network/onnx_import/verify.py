"""The imported graph beside ONNX Runtime on the same noise."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.network.batch import difference, noise
from dreamquant.runtime import session_options

TOLERANCE = 1e-3  # of 1 + the largest output: two float32 runtimes differ by 1e-6 a layer, a wrong attribute by much more


def verify(graph: fx.GraphModule, path: Path, shape: tuple[int, int, int], batch: int) -> None:
    """Raise ModelError where `graph` and ONNX Runtime, running the file `path`, differ on noise (batch, *shape)."""
    images = noise(batch, shape)
    expected = _run(path, images)
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


def _run(path: Path, images: Tensor) -> list[Tensor]:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # ONNX Runtime's errors have no common base
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: ONNX Runtime cannot run it: {reason}") from error
    return [torch.as_tensor(output) for output in outputs]
