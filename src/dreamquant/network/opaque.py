"""Operators of an ONNX file that have no counterpart in torch: each is kept as it is, run by ONNX Runtime, in float.

Such a node is a call of `onnx_node` with a model of that one node as text, small constants stored in it. No gradient passes it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, shape_inference
from torch import Tensor, fx

from dreamquant.devices import CPU
from dreamquant.errors import ModelError, OptionError, UnsupportedOperator, blamed
from dreamquant.limits import check_memory
from dreamquant.network.graph import Network, is_input
from dreamquant.network.notes import notes
from dreamquant.runtime import MICROSOFT, computing

_SESSIONS = 64  # kept open at a time


def onnx_node(text: str, *inputs: Tensor) -> Any:
    """What the one node of a model (`as_text`) gives for its inputs, in their order: a tensor, or a tuple of several.

    On the meta device only shapes are computed.
    """
    if any(value.is_meta for value in inputs):
        found = outputs_of(text, [tuple(value.shape) for value in inputs])
        results = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in found]
    else:
        results = [value.to(inputs[0].device) for value in _runner(text)(inputs)]
    return results[0] if len(results) == 1 else tuple(results)


def as_text(model: onnx.ModelProto) -> str:
    """A model of one node as an argument of `onnx_node`."""
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode()


def model_of(text: str) -> onnx.ModelProto:
    """The model that `as_text` wrote."""
    model: onnx.ModelProto = onnx.load_from_string(base64.b64decode(text))
    return model


def node_of(call: fx.Node) -> onnx.NodeProto:
    """The ONNX node of a call of `onnx_node`."""
    (node,) = model_of(str(call.args[0])).graph.node
    assert isinstance(node, onnx.NodeProto)
    return node


def is_opaque(node: fx.Node) -> bool:
    """Whether a node is a call of `onnx_node`."""
    return node.op == "call_function" and node.target is onnx_node


def stops_gradient(node: fx.Node) -> bool:
    """Whether no gradient passes a node: one that ONNX Runtime runs, or one that gives whole numbers or yes and no."""
    dtype = notes(node).dtype
    return is_opaque(node) or (dtype is not None and not dtype.is_floating_point)


def in_reach(graph: fx.Graph) -> set[fx.Node]:
    """The nodes from which a gradient reaches the images."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_input(node) or (not stops_gradient(node) and found.intersection(node.all_input_nodes)):
            found.add(node)
    return found


def check_gradient(loss: Tensor, what: str, instead: str) -> None:
    """`OptionError` where `loss` does not depend, by a gradient, on what is to be learnt: `what` cannot be, do `instead`."""
    if not loss.requires_grad:
        raise OptionError(f"{what}: no gradient reaches it, as none passes operators that stay in float; {instead}")


def float_operators(network: Network) -> list[str]:
    """What stays in float for want of a counterpart: such nodes of the graph, and the operators behind its last values."""
    tail = network.source.tail
    counts: Counter[str] = Counter()
    behind = set(network.source.ends)
    for node in [] if tail is None else tail.graph.node:
        if behind.intersection(node.input):
            behind.update(node.output)
            counts[node.op_type] += 1
    operators = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    return [node.name for node in network.graph.graph.nodes if is_opaque(node)] + operators


def outputs_of(text: str, shapes: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and number type of each output, by ONNX's arithmetic of shapes; of an operator that ONNX does not know, from a run.

    Raises `UnsupportedOperator` where a size depends on the values of the inputs, or an output is no tensor.
    """
    model = model_of(text)
    for value, shape in zip(model.graph.input, shapes, strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape))
    (node,) = model.graph.node
    if node.domain == MICROSOFT:
        return _tried(text, shapes)
    with blamed(UnsupportedOperator, f"operator {node.op_type}"):
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    found = []
    for output in inferred.graph.output:
        tensor = output.type.tensor_type
        dims = tensor.shape.dim
        if (
            not output.type.HasField("tensor_type")
            or not tensor.HasField("shape")
            or any(not d.HasField("dim_value") for d in dims)
        ):
            raise UnsupportedOperator(f"operator {node.op_type} gives tensors whose sizes depend on values")
        shape = tuple(dim.dim_value for dim in dims)
        dtype = _dtype(tensor.elem_type)
        check_memory(int(np.prod(shape, dtype=object)) * dtype.itemsize, f"operator {node.op_type} on {list(shapes)}", ModelError)
        found.append((shape, dtype))
    return found


def _tried(text: str, shapes: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    first, second = (_runner(text)([torch.full(shape, fill, device=CPU) for shape in shapes]) for fill in (0.0, 0.5))
    if [value.shape for value in first] != [value.shape for value in second]:
        raise UnsupportedOperator("its sizes depend on values")
    return [(tuple(value.shape), value.dtype) for value in first]


def _dtype(number: int) -> torch.dtype:
    try:
        return torch.from_numpy(np.zeros((), helper.tensor_dtype_to_np_dtype(number))).dtype
    except (TypeError, KeyError) as error:
        raise UnsupportedOperator(f"torch has no counterpart for {onnx.TensorProto.DataType.Name(number)}") from error


@lru_cache(maxsize=_SESSIONS)
def _runner(text: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    model = model_of(text)
    dtypes = {value.name: _dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    run = computing(model.SerializeToString(), f"operator {model.graph.node[0].op_type}")

    def compute(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = zip(dtypes.items(), inputs, strict=True)
        return [
            torch.from_numpy(value)
            for value in run({name: x.detach().cpu().to(dtype).contiguous().numpy() for (name, dtype), x in given})
        ]

    return compute
