"""Element-wise arithmetic, comparisons, clipping and casts."""

from __future__ import annotations

from typing import Any

import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Emitter, Value, emits, refuse
from dreamquant.network.graph import aten

UNARY = {
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal",
    aten.erf.default: "Erf",
    aten.floor.default: "Floor",
    aten.ceil.default: "Ceil",
    aten.round.default: "Round",
    aten.sign.default: "Sign",
    aten.sin.default: "Sin",
    aten.cos.default: "Cos",
    aten.tan.default: "Tan",
    aten.atan.default: "Atan",
}
COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


def _unary(op_type: str) -> Emitter:
    return lambda g, x: g.op(op_type, g.cast(x, g.dtype))


def _comparison(op_type: str) -> Emitter:
    return lambda g, x, other: g.op(op_type, *_common(g, x, other))


def _common(g: Builder, x: Value, other: Any) -> tuple[str, str]:
    """Both sides in the dtype that torch compares or combines them in."""
    sides = [torch.empty((1,) * v.rank, dtype=v.dtype) if isinstance(v, Value) else v for v in (x, other)]
    dtype = torch.result_type(sides[0], sides[1])
    return g.cast(x, dtype), g.cast(other, dtype)


for _target, _op_type in UNARY.items():
    emits(_target)(_unary(_op_type))
for _name, _op_type in COMPARISONS.items():
    _packet = getattr(aten, _name)
    emits(_packet.Scalar, _packet.Tensor)(_comparison(_op_type))


@emits(aten.ne.Scalar, aten.ne.Tensor)
def ne(g: Builder, x: Value, other: Any) -> str:
    return g.op("Not", g.op("Equal", *_common(g, x, other)))


@emits(aten.add.Tensor, aten.add.Scalar)
def add(g: Builder, x: Value, other: Any, alpha: float = 1) -> str:
    return g.op("Add", g.cast(x, g.dtype), _scaled(g, other, alpha))


@emits(aten.sub.Tensor, aten.sub.Scalar)
def sub(g: Builder, x: Value, other: Any, alpha: float = 1) -> str:
    return g.op("Sub", g.cast(x, g.dtype), _scaled(g, other, alpha))


@emits(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(g: Builder, x: Value, other: Any, alpha: float = 1) -> str:
    return g.op("Sub", g.cast(other, g.dtype), _scaled(g, x, alpha))


def _scaled(g: Builder, other: Any, alpha: float) -> str:
    if alpha == 1:
        return g.cast(other, g.dtype)
    if isinstance(other, int | float):
        return g.cast(other * alpha, g.dtype)
    return g.op("Mul", g.cast(other, g.dtype), g.const(alpha, g.dtype))


@emits(aten.mul.Tensor, aten.mul.Scalar)
def mul(g: Builder, x: Value, other: Any) -> str:
    return g.op("Mul", g.cast(x, g.dtype), g.cast(other, g.dtype))


@emits(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def div(g: Builder, x: Value, other: Any, rounding_mode: str | None = None) -> str:
    if rounding_mode is not None and not g.dtype.is_floating_point:
        refuse(f"rounding_mode={rounding_mode!r} on integers")
    quotient = g.op("Div", g.cast(x, g.dtype), g.cast(other, g.dtype))
    if rounding_mode is None:
        return quotient
    if rounding_mode == "floor":
        return g.op("Floor", quotient)
    return g.op("Mul", g.op("Sign", quotient), g.op("Floor", g.op("Abs", quotient)))


@emits(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
def power(g: Builder, x: Value, exponent: Any) -> str:
    base = g.cast(x, g.dtype)
    return g.op("Mul", base, base) if exponent == 2 else g.op("Pow", base, g.cast(exponent, g.dtype))


@emits(aten.pow.Scalar)
def power_of_scalar(g: Builder, base: float, exponent: Value) -> str:
    return g.op("Pow", g.cast(base, g.dtype), g.cast(exponent, g.dtype))


@emits(aten.square.default)
def square(g: Builder, x: Value) -> str:
    return g.op("Mul", x, x)


@emits(aten.rsqrt.default)
def rsqrt(g: Builder, x: Value) -> str:
    return g.op("Reciprocal", g.op("Sqrt", g.cast(x, g.dtype)))


@emits(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(g: Builder, x: Value, other: Any) -> str:
    return g.op("Mod", g.cast(x, g.dtype), g.cast(other, g.dtype), fmod=1)


@emits(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(g: Builder, x: Value, other: Any) -> str:
    """The rest of a division that rounds down, as Python's %."""
    value, divisor = g.cast(x, g.dtype), g.cast(other, g.dtype)
    if not g.dtype.is_floating_point:
        return g.op("Mod", value, divisor)
    return g.op("Sub", value, g.op("Mul", divisor, g.op("Floor", g.op("Div", value, divisor))))


@emits(aten.maximum.default)
def maximum(g: Builder, x: Value, other: Value) -> str:
    return g.op("Max", g.cast(x, g.dtype), g.cast(other, g.dtype))


@emits(aten.minimum.default)
def minimum(g: Builder, x: Value, other: Value) -> str:
    return g.op("Min", g.cast(x, g.dtype), g.cast(other, g.dtype))


@emits(aten.clamp.default, aten.hardtanh.default)
def clamp(g: Builder, x: Value, low: float | None = None, high: float | None = None) -> str:
    if g.current.target is aten.hardtanh.default:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    bounds = [None if bound is None else g.const(bound, g.dtype, what) for bound, what in ((low, "min"), (high, "max"))]
    return g.op("Clip", g.cast(x, g.dtype), *bounds)


@emits(aten.relu6.default)
def relu6(g: Builder, x: Value) -> str:
    return clamp(g, x, 0.0, 6.0)


@emits(aten.clamp_min.default)
def clamp_min(g: Builder, x: Value, low: float) -> str:
    return clamp(g, x, low, None)


@emits(aten.clamp_max.default)
def clamp_max(g: Builder, x: Value, high: float) -> str:
    return clamp(g, x, None, high)


@emits(aten.clamp.Tensor)
def clamp_to_tensors(g: Builder, x: Value, low: Value | None = None, high: Value | None = None) -> str:
    raised = g.cast(x, g.dtype) if low is None else g.op("Max", g.cast(x, g.dtype), g.cast(low, g.dtype))
    return raised if high is None else g.op("Min", raised, g.cast(high, g.dtype))


@emits(aten.threshold.default)
def threshold(g: Builder, x: Value, limit: float, value: float) -> str:
    return g.op("Where", g.op("Greater", x, g.const(limit, x.dtype)), x, g.const(value, x.dtype))


@emits(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(g: Builder, condition: Value, x: Any, other: Any) -> str:
    return g.op("Where", g.cast(condition, torch.bool), g.cast(x, g.dtype), g.cast(other, g.dtype))


@emits(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(g: Builder, x: Value, mask: Value, value: Any) -> str:
    return where(g, mask, value, x)


@emits(aten.logical_not.default, aten.bitwise_not.default)
def logical_not(g: Builder, x: Value) -> str:
    return g.op("Not", x) if x.dtype == torch.bool else refuse(f"on {x.dtype}, not on truth values")


@emits(aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)
def logical_and(g: Builder, x: Value, other: Value) -> str:
    return _logical(g, "And", x, other)


@emits(aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
def logical_or(g: Builder, x: Value, other: Value) -> str:
    return _logical(g, "Or", x, other)


@emits(aten.logical_xor.default, aten.bitwise_xor.Tensor, aten.__xor__.Tensor)
def logical_xor(g: Builder, x: Value, other: Value) -> str:
    return _logical(g, "Xor", x, other)


def _logical(g: Builder, op_type: str, x: Value, other: Value) -> str:
    both = x.dtype == other.dtype == torch.bool
    return g.op(op_type, x, other) if both else refuse(f"on {x.dtype} and {other.dtype}, not on truth values")


@emits(aten.isnan.default)
def isnan(g: Builder, x: Value) -> str:
    return g.op("IsNaN", x)


@emits(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)
def cast(g: Builder, x: Value, *_: Any, **__: Any) -> str:
    return g.cast(x, g.dtype)


@emits(aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default)
def identity(g: Builder, x: Value, **_: Any) -> str:
    return g.op("Identity", x)


@emits(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(g: Builder, x: Value, _p: float, train: bool) -> str:
    return refuse("it drops values at random (train=True)") if train else g.op("Identity", x)
