"""ONNX files -> the inner graph: one function per operator, checked against ONNX Runtime when a file is loaded."""

from __future__ import annotations

from pathlib import Path

from dreamquant.network.graph import Network, Source
from dreamquant.network.onnx_import import (  # noqa: F401  (each enters its operators into the table)
    activation,
    convolution,
    elementwise,
    indexing,
    layout,
    linear,
    normalization,
    pooling,
    reading,
    reduction,
    resize,
)
from dreamquant.network.onnx_import.importer import ANY_BATCH, import_onnx, refuse_unsupported
from dreamquant.network.onnx_import.interface import image_input
from dreamquant.network.onnx_import.verify import verify
from dreamquant.network.outputs import find_outputs

__all__ = ["import_onnx", "load_onnx"]


def load_onnx(
    path: Path,
    *,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Network:
    """The network in the ONNX file `path`, proven to compute what ONNX Runtime computes.

    `input_shape` (C, H, W) fills in sizes the file leaves open; `mean` and `std`, one per channel, are what the user
    normalises pixels in 0..1 with. Raises ModelError where the file cannot be read, is not one float32 network from
    images, holds weights that are not finite, or where the import and ONNX Runtime disagree on noise;
    UnsupportedOperator where an operator has no counterpart.
    """
    proto = reading.read(path)
    refuse_unsupported(proto.graph, str(path))  # before the checker, which knows less to say about it
    reading.check(path)
    reading.check_finite(proto, str(path))
    graph, shape, batch = import_onnx(proto, name=str(path), input_shape=input_shape)
    fixed = image_input(proto.graph, str(path), shape)[2]
    verify(graph, path, shape, fixed or ANY_BATCH)
    source = Source(kind="onnx", text=str(path), path=path, proto=proto)
    return Network(graph, shape, source, mean, std, batch, find_outputs(graph, shape, batch, source))
