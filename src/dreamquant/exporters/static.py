"""A model for targets that know every shape when they compile it: sizes are written down, what follows from them is stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dreamquant.exporters.constants import stored_values
from dreamquant.runtime import onnx_runner, opened


def with_fixed_shapes(proto: onnx.ModelProto, sizes: tuple[int, ...], layout: str) -> onnx.ModelProto:
    """The model for images of these sizes, as the file takes them, and for no others; it stores what it computes from shapes.

    Raises `ModelError` where the runtime does not run it so.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    _set_sizes(fixed.graph.input[0], sizes)
    del fixed.graph.value_info[:]
    asked = [node.output[0] for node in fixed.graph.node if node.op_type == "Shape"]
    outputs = [output.name for output in fixed.graph.output]
    count, *image = sizes
    channels_first = (image[2], image[0], image[1]) if layout == "NHWC" else tuple(image)
    runner = onnx_runner(opened(fixed, asked), optimize=False, layout=layout)
    values = runner.run(np.zeros((count, *channels_first), np.float32), [*outputs, *asked])
    for output, value in zip(fixed.graph.output, values[: len(outputs)], strict=True):
        if output.type.tensor_type.HasField("shape") and len(output.type.tensor_type.shape.dim) == value.ndim:
            _set_sizes(output, value.shape)
    _store(fixed, dict(zip(asked, values[len(outputs) :], strict=True)), set(asked))
    _store_what_follows(fixed)
    return fixed


def _set_sizes(value: onnx.ValueInfoProto, sizes: Iterable[int]) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, list(sizes)))


def _store(proto: onnx.ModelProto, values: dict[str, NDArray[Any]], computed: set[str]) -> None:
    """Store values in place of the nodes that compute those of `computed`."""
    kept = [node for node in proto.graph.node if not computed.intersection(node.output)]
    graph = onnx.GraphProto()
    graph.node.extend(kept)
    del proto.graph.node[:]
    proto.graph.node.extend(graph.node)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())


def _store_what_follows(proto: onnx.ModelProto) -> None:
    """Store what is computed from stored tensors alone and read by what is not, in place of all that computes it.

    Constants that the file holds as nodes stay, and so does all that has a graph of its own.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {node.output[0] for node in proto.graph.node if node.op_type == "Constant"}
    follows: set[str] = set()
    read = {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        given = set(filter(None, node.input))
        graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node]
        if given and not graphs and given <= stored | follows:
            follows.update(node.output)
        else:
            read |= given.union(*(inner.input for graph in graphs for inner in graph.node))
    wanted = sorted(follows & read)
    if follows:
        _store(proto, stored_values(proto, wanted), follows)
