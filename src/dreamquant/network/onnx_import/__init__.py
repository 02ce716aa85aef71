"""ONNX files -> the inner graph: one function per operator, checked against ONNX Runtime when a file is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dreamquant.network.graph import Network, Source
from dreamquant.network.input_space import InputSpace
from dreamquant.network.onnx_import import (  # noqa: F401  (each enters its operators into the table)
    activation,
    convolution,
    elementwise,
    indexing,
    linear,
    moves,
    normalization,
    pooling,
    reading,
    reduction,
    resize,
)
from dreamquant.network.onnx_import.half import in_float32
from dreamquant.network.onnx_import.importer import ANY_BATCH, import_onnx, refuse_unsupported
from dreamquant.network.onnx_import.verify import verify
from dreamquant.network.outputs import find_outputs

__all__ = ["import_onnx", "load_onnx"]


def load_onnx(path: Path, *, input_shape: tuple[int, int, int] | None = None, layout: str | None = None) -> Network:
    """The network in the ONNX file `path`, proven to compute what ONNX Runtime computes.

    `input_shape` (C, H, W) fills in sizes the file leaves open, `layout` says how it has images. A file in half precision is
    read as float32, one in an old opset in a newer one, and branches that are known, and operators that ONNX Runtime has merged,
    as what they stand for. An operator without a counterpart stays as it is, in float. Raises ModelError where the file cannot
    be read, is not one network from images, holds weights that are not finite, or where the import and ONNX Runtime disagree on
    noise; UnsupportedOperator where an operator has no counterpart and cannot stay.
    """
    proto = reading.read(path)
    refuse_unsupported(proto, str(path))  # before the checker, which knows less to say about it
    reading.check(path)
    reading.check_finite(proto, str(path))
    single = in_float32(proto)
    graph, given, batch, proto, ends, tail = import_onnx(single, name=str(path), input_shape=input_shape, layout=layout)
    verify(
        graph, path if single is proto else single.SerializeToString(), proto, ends, str(path), given, given.batch or ANY_BATCH
    )
    source = Source(kind="onnx", text=str(path), path=path, proto=proto, ends=ends, tail=tail)
    network = Network(graph, given.shape, source, InputSpace(layout=given.layout, dtype=given.dtype), batch)
    return replace(network, outputs=find_outputs(network))
