"""Activation functions."""

from __future__ import annotations

import math

import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Emitter, Value, emits
from dreamquant.network.graph import aten

PLAIN = {
    aten.relu.default: "Relu",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
}


def _plain(op_type: str) -> Emitter:
    return lambda g, x: g.op(op_type, x)


for _target, _op_type in PLAIN.items():
    emits(_target)(_plain(_op_type))


@emits(aten.leaky_relu.default)
def leaky_relu(g: Builder, x: Value, negative_slope: float = 0.01) -> str:
    return g.op("LeakyRelu", x, alpha=float(negative_slope))


@emits(aten.prelu.default, aten._prelu_kernel.default)
def prelu(g: Builder, x: Value, weight: Value) -> str:
    if weight.rank == x.rank or x.rank < 3:
        return g.op("PRelu", x, weight)
    return g.op("PRelu", x, g.reshape(weight, (-1, *[1] * (x.rank - 2))))  # one slope a channel, channels on axis 1


@emits(aten.elu.default)
def elu(g: Builder, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    if input_scale == 1:
        curve = g.op("Elu", x, alpha=float(alpha))
        return curve if scale == 1 else g.op("Mul", curve, g.const(scale, x.dtype))
    grown = g.op("Exp", g.op("Mul", g.op("Min", x, g.const(0, x.dtype)), g.const(input_scale, x.dtype)))
    below = g.op("Mul", g.op("Sub", grown, g.const(1, x.dtype)), g.const(alpha * scale, x.dtype))
    return g.op("Add", g.op("Mul", g.op("Relu", x), g.const(scale, x.dtype)), below)


@emits(aten.selu.default)
def selu(g: Builder, x: Value) -> str:
    return g.op("Selu", x)


@emits(aten.celu.default)
def celu(g: Builder, x: Value, alpha: float = 1.0) -> str:
    return g.op("Celu", x, alpha=float(alpha))


@emits(aten.silu.default)
def silu(g: Builder, x: Value) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


@emits(aten.hardsigmoid.default)
def hardsigmoid(g: Builder, x: Value) -> str:
    return g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@emits(aten.hardswish.default)
def hardswish(g: Builder, x: Value) -> str:
    return g.op("HardSwish", x) if g.opset >= 14 else g.op("Mul", x, hardsigmoid(g, x))


@emits(aten.gelu.default)
def gelu(g: Builder, x: Value, approximate: str = "none") -> str:
    if g.opset >= 20:
        return g.op("Gelu", x, approximate=approximate)
    half, one = g.const(0.5, x.dtype), g.const(1.0, x.dtype)
    if approximate == "tanh":
        cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), g.const(0.044715, x.dtype))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.const(math.sqrt(2 / math.pi), x.dtype)))
    else:
        inner = g.op("Erf", g.op("Div", x, g.const(math.sqrt(2), x.dtype)))
    return g.op("Mul", g.op("Mul", x, g.op("Add", inner, one)), half)


@emits(aten.softplus.default)
def softplus(g: Builder, x: Value, beta: float = 1, _threshold: float = 20) -> str:
    """Above the threshold torch returns x itself, which differs from the formula by less than exp(-threshold)."""
    if beta == 1:
        return g.op("Softplus", x)
    factor = g.const(beta, x.dtype)
    return g.op("Div", g.op("Softplus", g.op("Mul", x, factor)), factor)


@emits(aten.mish.default)
def mish(g: Builder, x: Value) -> str:
    return g.op("Mish", x) if g.opset >= 18 else g.op("Mul", x, g.op("Tanh", g.op("Softplus", x)))


@emits(aten.log_sigmoid.default)
def log_sigmoid(g: Builder, x: Value) -> str:
    return g.op("Neg", g.op("Softplus", g.op("Neg", x)))


@emits(aten.glu.default)
def glu(g: Builder, x: Value, dim: int = -1) -> str:
    half = x.size(dim) // 2
    value, gate = g.ops("Split", x, g.ints([half, half], "sizes"), outputs=2, axis=dim)
    return g.op("Mul", value, g.op("Sigmoid", gate))


@emits(aten.softmax.int, aten._softmax.default)
def softmax(g: Builder, x: Value, dim: int, _dtype: torch.dtype | bool | None = None) -> str:
    return g.op("Softmax", g.cast(x, g.dtype), axis=dim)


@emits(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(g: Builder, x: Value, dim: int, _dtype: torch.dtype | bool | None = None) -> str:
    return g.op("LogSoftmax", g.cast(x, g.dtype), axis=dim)
