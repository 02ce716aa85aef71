"""Weights on a codebook in an ONNX model: stored as indices, looked up in a table of levels.

One table: indices -> Cast -> Gather. A row for each channel: indices (channels, n) -> Cast -> GatherElements -> Reshape, and
Transpose where the channels are not the first axis. All of these read stored tensors only, and ONNX Runtime computes them once,
when it loads the file (Cast from 4 bits since 1.23); a DequantizeLinear in their place would be left for every run.

Then the layer has float weights. Where it stands between DequantizeLinear and QuantizeLinear, but for Relu and Clip, ONNX Runtime
rounds float weights to 8 bits, with one scale for all channels: behind such layers something has to stand in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
from onnx import TensorProto
from torch import Tensor, fx

from dreamquant.exporters.packing import array, packed
from dreamquant.exporters.surgery import Surgery
from dreamquant.network.operators import WEIGHTED, argument, bias_node, is_call
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.moves import unmoved
from dreamquant.quantization.student import Student

CONTAINER = 8  # bits that activations are stored in


def looked_up(surgery: Surgery, name: str, codebook: Codebook, value: Tensor, *, transposed: bool) -> str:
    """The name of the weight `name` of this value, on its levels; transposed where the model's layer wants it so.

    A weight so small that indices and table take more than its floats do is stored as floats that are on the levels.
    """
    indices, levels, axis = codebook.indices(value), codebook.levels, codebook.axis
    if transposed and axis is None:
        indices = indices.t()
    bits = 4 if codebook.bits <= 4 else 8
    if 4 * levels.numel() + value.numel() * bits / 8 >= 4 * value.numel():
        floats = codebook.fake(value)
        return surgery.constant(f"{name}_levels", array(floats.t() if transposed else floats))
    if axis is not None:
        indices = codebook.rows(indices)
    stored = surgery.constant(f"{name}_q", packed(indices, bits=bits, signed=False))
    table = surgery.constant(f"{name}_levels", array(levels.squeeze(0) if axis is None else levels))
    cast = surgery.fresh("indices")
    surgery.insert("Cast", [stored], cast, to=TensorProto.INT32)
    result = surgery.fresh("dequantized")
    if axis is None:
        surgery.insert("Gather", [table, cast], result, after=cast, axis=0)
        return result
    surgery.insert("GatherElements", [table, cast], result, after=cast, axis=1)
    if value.dim() > 2:
        shape = surgery.constant("shape", np.array(value.transpose(0, axis).shape))
        source, result = result, surgery.fresh("dequantized")
        surgery.insert("Reshape", [source, shape], result, after=source)
    if (axis != 0) != transposed:
        order = list(range(value.dim()))
        order[0], order[axis or 1] = order[axis or 1], 0
        source, result = result, surgery.fresh("dequantized")
        surgery.insert("Transpose", [source], result, after=source, perm=order)
    return result


def float_results(student: Student, names: Mapping[str, str], in_float: Mapping[fx.Node, bool]) -> set[str]:
    """What is computed by layers whose weights are floats to ONNX Runtime: left in float, looked up, or levels `in_float` (as by
    `float_layers`) of what reads integers; and by those whose float bias it would round, to a grid that few bits make coarse."""
    layers = set(student.float_layers()) | {node.name for node, reads in in_float.items() if reads}
    tensors = student.tensors()
    for tensor in tensors:
        if isinstance(tensor.grid, Codebook):
            layers |= {layer.name for layer in tensor.quantizer.users}
    biased = {layer for tensor in tensors if tensor.kind == "bias" for layer in tensor.quantizer.users}
    coarse = {tensor.quantizer for tensor in tensors if tensor.kind == "activation" and tensor.grid.bits < CONTAINER}
    for node in student.network.graph.graph.nodes:
        if is_call(node, WEIGHTED) and bias_node(node) is not None and node not in biased:
            layers |= {node.name} if unmoved(argument(node, 0)) in coarse else set()
    return {names[layer] for layer in layers if layer in names}


def comes_of(surgery: Surgery, value: str, results: Set[str]) -> bool:
    """Whether a value is one of `results`, or is made of one by operators that read nothing else but stored tensors."""
    node = surgery.producer(value)
    while results and node is not None and node.op_type != "DequantizeLinear":
        if value in results:
            return True
        makers = [(name, maker) for name in node.input if (maker := surgery.producer(name)) is not None]
        computed = [(name, maker) for name, maker in makers if maker.op_type not in ("Constant", "Cast")]  # a Clip's limits
        if len(computed) != 1:
            return False
        ((value, node),) = computed
    return False
