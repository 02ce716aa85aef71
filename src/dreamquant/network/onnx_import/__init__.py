"""ONNX files -> the inner graph: one function per operator, checked against ONNX Runtime when a file is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

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
from dreamquant.network.onnx_import.standard import TAKEN_APART, opset_of
from dreamquant.network.onnx_import.verify import verify
from dreamquant.network.opaque import float_operators
from dreamquant.network.outputs import find_outputs
from dreamquant.runtime import MICROSOFT

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
    return replace(network, outputs=find_outputs(network), remarks=_remarks(network, single))


def _remarks(network: Network, file: onnx.ModelProto) -> tuple[str, ...]:
    """What of a network is not as it is in its file, in sentences."""
    proto, kept = network.source.proto, float_operators(network)
    assert proto is not None
    found = [f"stays in float: {', '.join(kept)}"] if kept else []
    other = [output.name for output in proto.graph.output if output.name not in network.source.ends]
    if other:
        found.append(f"no answer to each image: {', '.join(other)}; measured is {', '.join(network.source.ends)}")
    if opset_of(proto) != opset_of(file):
        found.append(f"opset {opset_of(file)} becomes {opset_of(proto)}")
    given = {node.op_type for node in file.graph.node} - {node.op_type for node in proto.graph.node}
    if "If" in given:
        found.append("branches whose condition is known take the place of their If")
    merged = sorted(name for domain, name in TAKEN_APART if domain == MICROSOFT and name in given)
    return (*found, *([f"taken apart: {', '.join(merged)}"] if merged else []))
