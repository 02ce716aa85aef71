"""The imported graph beside ONNX Runtime on the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.network.batch import difference, noise
from dreamquant.network.front import as_fed
from dreamquant.network.onnx_import.interface import ImageInput
from dreamquant.runtime import opened, run_options, session_options

TOLERANCE = 1e-3  # of 1 + the largest output: two float32 runtimes differ by 1e-6 a layer, a wrong attribute by much more


def verify(
    graph: fx.GraphModule,
    model: Path | bytes,
    proto: onnx.ModelProto,
    ends: Sequence[str],
    path: str,
    given: ImageInput,
    batch: int,
) -> None:
    """Raise ModelError where `graph` and ONNX Runtime, running `model`, the file `path`, differ on noise (batch, C, H, W).

    `proto` is the model as it was imported. Where the values `ends` of it, which the graph gives, are no outputs of the file,
    they are compared with its own, and its outputs with the file's.
    """
    images = noise(batch, given.shape)
    if given.dtype == "uint8":
        images = (images * 64 + 128).round().clamp(0, 255)
    elif given.dtype == "float16":
        images = images.half().float()
    fed = as_fed(images, given.layout, getattr(torch, given.dtype))
    outputs = [output.name for output in proto.graph.output]
    expected = _run(model, path, fed, outputs)
    inner = [name for name in ends if name not in outputs]
    if inner:
        imported = _run(opened(proto, inner), path, fed, [*outputs, *inner])
        for name in outputs:
            _compare("the model in its newer opset", name, expected[name], imported[name], path)
        expected |= {name: imported[name] for name in inner}
    with torch.no_grad():
        found = graph(images)
    for name, value in zip(ends, found if isinstance(found, tuple) else [found], strict=True):
        _compare("the imported network", name, expected[name], value, path)


def _compare(what: str, name: str, expected: Tensor, actual: Tensor, path: str) -> None:
    error = difference(expected, actual)
    if not error <= TOLERANCE:
        raise ModelError(
            f"{path}: {what} and ONNX Runtime disagree on noise: output {name!r} differs by {error:.2g} of its largest value,"
            f" {TOLERANCE:g} is allowed"
        )


def _run(model: Path | bytes, path: str, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        given = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        values = session.run(names, {session.get_inputs()[0].name: images.numpy()}, run_options())
    except Exception as error:  # ONNX Runtime's errors have no common base
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: ONNX Runtime cannot run it: {reason}") from error
    arrays = [np.asarray(value) for value in values]
    found = [torch.as_tensor(array.astype(np.float32) if array.dtype == np.float16 else array) for array in arrays]
    return dict(zip(names, found, strict=True))
