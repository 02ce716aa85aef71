"""The stored half of the proof: every tensor that the file holds, read back, beside the student's.

What runs may hide what is stored: a channel that no sample wakes, a zero point that only moves zeros. So each weight and bias is
taken as the file's layers read it, through DequantizeLinear or a table of levels, and each scale and zero point of an activation
as it stands, and all have to be the student's to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import fx

from dreamquant.errors import VerificationError
from dreamquant.exporters.constants import REFUSED, stored_values
from dreamquant.exporters.packing import array
from dreamquant.exporters.qdq import Stored
from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import notes
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import quantizer_of

Array = NDArray[Any]
ULP = 2.0**-22  # of a bias: an int32 has more digits than a float32, and the last are rounded on either way


def read_back(student: Student, proto: onnx.ModelProto, integers: Mapping[str, str], stored: Mapping[str, Stored]) -> int:
    """The number of tensors of the file that were compared; `VerificationError` names the first that is not the student's.

    `integers` and `stored` as `to_onnx` gives them.
    """
    values = stored_values(proto, {place.value for place in stored.values()})
    nodes = {node.name: node for node in student.network.graph.graph.nodes}
    for name, place in stored.items():
        node = nodes[name]
        expected = _expected(student.network.graph, node)
        allowed = ULP if notes(node).kind == "bias" else 0.0
        _compare(_called(node), expected.T if place.transposed else expected, values[place.value], allowed)
    return len(stored) + _grids(student, proto, integers)


def _expected(graph: fx.GraphModule, node: fx.Node) -> Array:
    """What the student's layers read from a stored tensor, or from the quantizer behind it."""
    if node.op == "get_attr":
        return array(tensor_of(graph, node))
    grid = quantizer_of(graph, node).grid
    assert grid is not None
    return array(grid.fake(tensor_of(graph, node.all_input_nodes[0])))


def _called(node: fx.Node) -> str:
    return f"{notes(node).kind} {node.all_input_nodes[0].target}" if node.op == "call_module" else f"stored tensor {node.target}"


def _compare(what: str, expected: Array, found: Array, allowed: float = 0.0) -> None:
    if expected.shape != found.shape:
        raise VerificationError(f"{REFUSED}: its {what} is {found.shape}, the student's {expected.shape}")
    one, other = expected.astype(np.float64), found.astype(np.float64)
    apart = ~((one == other) | (np.abs(one - other) <= allowed * np.abs(one)))
    if apart.any():
        largest = np.abs(one - other)[apart].max()
        raise VerificationError(
            f"{REFUSED}: {int(apart.sum()):,} of the {one.size:,} values of its {what} are not the student's, the furthest"
            f" {largest:.3g} off"
        )


def _grids(student: Student, proto: onnx.ModelProto, integers: Mapping[str, str]) -> int:
    """Compare scale and zero point of every QuantizeLinear and DequantizeLinear of an activation, and what integers are padded
    with; returns how many there are."""
    grids = {integers[t.quantizer.name]: (t.node.name, t.grid) for t in student.tensors() if t.quantizer.name in integers}
    stated: list[tuple[str, str, str]] = []  # by integers: which number, and the value that holds it
    made = set()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in grids:
            stated += zip([node.input[0]] * 2, _NUMBERS, node.input[1:], strict=True)
        elif node.op_type == "QuantizeLinear" and node.output[0] in grids:
            stated += zip([node.output[0]] * 2, _NUMBERS, node.input[1:], strict=True)
            made.add(node.output[0])
        elif node.op_type == "Pad" and node.output[0] in grids:
            stated.append((node.output[0], "zero point", node.input[2]))
            made.add(node.output[0])
    values = stored_values(proto, {value for _, _, value in stated})
    for integer, number, value in stated:
        name, grid = grids[integer]
        assert isinstance(grid, Grid)
        expected = grid.scale if number == "scale" else grid.zero_point
        _compare(f"{number} of {name}", array(expected.reshape(())), values[value])
    if made != set(grids):
        raise VerificationError(f"{REFUSED}: of {len(integers)} quantized tensors some are not quantized in it")
    return len(stated)


_NUMBERS = ("scale", "zero point")
