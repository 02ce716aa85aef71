"""Operators without a counterpart in torch, kept as they are: see `network.opaque`."""

from __future__ import annotations

import operator

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from dreamquant.errors import UnsupportedOperator
from dreamquant.network.onnx_import.builder import Builder, Known
from dreamquant.network.opaque import as_text, onnx_node, outputs_of
from dreamquant.runtime import MICROSOFT

STORED = 64  # a constant of more elements is no size, and is an input as any other


def stays(builder: Builder, node: onnx.NodeProto) -> list[fx.Node | Known] | None:
    """The outputs of a node that ONNX Runtime runs as it is; None where their sizes depend on values, or they are no tensors."""
    values = {name: builder.values[name] for name in node.input if name}
    stored = {name: value.array for name, value in values.items() if isinstance(value, Known) and value.array.size <= STORED}
    inputs = [name for name in values if name not in stored]
    kept = onnx.NodeProto()
    kept.CopyFrom(node)
    while kept.output and not kept.output[-1]:
        del kept.output[-1]
    graph = helper.make_graph(
        [kept],
        "one",
        [helper.make_tensor_value_info(name, _number(builder, values[name]), None) for name in inputs],
        [helper.make_value_info(name, onnx.TypeProto()) for name in kept.output if name],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    imports = [helper.make_opsetid("", builder.opset), helper.make_opsetid(MICROSOFT, 1)]
    text = as_text(helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports[:1])))
    try:
        outputs_of(text, [builder.shape(values[name]) for name in inputs])
    except UnsupportedOperator:
        return None
    call = builder.call(onnx_node, text, *(builder.node(values[name]) for name in inputs), title=node.op_type.lower())
    given = [name for name in kept.output if name]
    items = iter([call] if len(given) == 1 else [builder.call(operator.getitem, call, place) for place in range(len(given))])
    return [next(items) if name else Known("", np.zeros(0)) for name in kept.output]


def _number(builder: Builder, value: fx.Node | Known) -> int:
    """ONNX's number of a value's element type."""
    array = value.array if isinstance(value, Known) else torch.zeros((), dtype=builder.dtype(value)).numpy()
    return helper.np_dtype_to_tensor_dtype(array.dtype)
