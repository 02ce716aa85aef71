"""Single numbers that activations are added to, multiplied by, ...: for targets that know integers alone, a number is one too.

It is the only level of its grid, or a neighbour of the zero point, so that nothing is rounded: c is 1 on the scale c.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from dreamquant.errors import UnsupportedOperator
from dreamquant.exporters.packing import packed
from dreamquant.exporters.surgery import Surgery
from dreamquant.quantization.forms import Form, is_power_of_two

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu")


def quantize_scalars(surgery: Surgery, form: Form) -> None:
    """Put the single numbers that arithmetic reads beside integers on grids of this form.

    Raises `UnsupportedOperator` where scales are powers of two, and the number is none.
    """
    stored = {tensor.name: tensor for tensor in surgery.proto.graph.initializer} | surgery.added
    made: dict[str, str] = {}
    for node in list(surgery.nodes):
        if node.op_type not in ARITHMETIC or not any(_is_dequantized(surgery, name) for name in node.input):
            continue
        for place, name in enumerate(node.input):
            tensor = stored.get(name) or _of_constant(surgery, name)
            if tensor is None or tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) != 1:
                continue
            value = float(numpy_helper.to_array(tensor).reshape(()))
            if not math.isfinite(value):
                continue
            if form.power_of_two and not is_power_of_two(abs(value) or 1.0):
                raise UnsupportedOperator(
                    f"{node.op_type} {node.name or node.output[0]} reads {value:.6g}, which is no power of two"
                )
            if name not in made:
                made[name] = _on_grid(surgery, name, value, list(tensor.dims), form)
            node.input[place] = made[name]


def _is_dequantized(surgery: Surgery, name: str) -> bool:
    maker = surgery.producer(name)
    return maker is not None and maker.op_type == "DequantizeLinear"


def _of_constant(surgery: Surgery, name: str) -> TensorProto | None:
    maker = surgery.producer(name)
    if maker is None or maker.op_type != "Constant" or maker.attribute[0].name != "value":
        return None
    tensor: TensorProto = helper.get_attribute_value(maker.attribute[0])
    return tensor


def _on_grid(surgery: Surgery, name: str, value: float, shape: list[int], form: Form) -> str:
    bits = 8 if form.bits <= 8 else 16
    integer, zero_point = (int(np.sign(value)), 0) if form.signed else (int(value > 0), int(value < 0))
    integers = packed(torch.full(shape, integer), bits=bits, signed=form.signed)
    zero = packed(torch.tensor(zero_point), bits=bits, signed=form.signed)
    scale = np.asarray(abs(value) or 1.0, np.float32)
    inputs = [surgery.constant(f"{name}_q", integers), surgery.constant("scale", scale), surgery.constant("zero", zero)]
    result = surgery.fresh("dequantized")
    surgery.insert("DequantizeLinear", inputs, result)
    return result
