"""Operators on single elements: arithmetic, comparison, logic, casts."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import torch
from torch import fx

from dreamquant.network.onnx_import.builder import FLOAT32_ONLY, Function, Known, Op, operator

aten = torch.ops.aten

UNARY = {
    "Relu": aten.relu.default,
    "Sigmoid": aten.sigmoid.default,
    "Tanh": aten.tanh.default,
    "HardSwish": aten.hardswish.default,
    "Mish": aten.mish.default,
    "Softplus": aten.softplus.default,
    "Erf": aten.erf.default,
    "Sqrt": aten.sqrt.default,
    "Exp": aten.exp.default,
    "Log": aten.log.default,
    "Neg": aten.neg.default,
    "Abs": aten.abs.default,
    "Sign": aten.sign.default,
    "Reciprocal": aten.reciprocal.default,
    "Floor": aten.floor.default,
    "Ceil": aten.ceil.default,
    "Round": aten.round.default,
    "Sin": aten.sin.default,
    "Cos": aten.cos.default,
    "Tan": aten.tan.default,
    "Atan": aten.atan.default,
    "Not": aten.logical_not.default,
    "IsNaN": aten.isnan.default,
}

BINARY = {
    "Add": aten.add.Tensor,
    "Sub": aten.sub.Tensor,
    "Mul": aten.mul.Tensor,
    "And": aten.logical_and.default,
    "Or": aten.logical_or.default,
    "Xor": aten.logical_xor.default,
    "Equal": aten.eq.Tensor,
    "Less": aten.lt.Tensor,
    "LessOrEqual": aten.le.Tensor,
    "Greater": aten.gt.Tensor,
    "GreaterOrEqual": aten.ge.Tensor,
}

CHAINED = {"Min": aten.minimum.default, "Max": aten.maximum.default, "Sum": aten.add.Tensor, "Mean": aten.add.Tensor}

DTYPES = {
    onnx.TensorProto.FLOAT16: torch.float32,  # left at outputs only; inside, such a file has become one in float32
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


def _on_all_inputs(target: Any) -> Function:
    return lambda op: op.call(target, *op.tensors())


for _name, _target in (UNARY | BINARY).items():
    operator(_name)(_on_all_inputs(_target))


@operator(*CHAINED)
def chained(op: Op) -> fx.Node:
    target, tensors = CHAINED[op.node.op_type], op.tensors()
    total = functools.reduce(lambda left, right: op.call(target, left, right), tensors)
    return op.call(aten.div.Tensor, total, float(len(tensors))) if op.node.op_type == "Mean" else total


@operator("Div")
def divide(op: Op) -> fx.Node:
    if op.builder.dtype(op.value(0)).is_floating_point:
        return op.call(aten.div.Tensor, *op.tensors())
    return op.call(aten.div.Tensor_mode, *op.tensors(), rounding_mode="trunc")


@operator("Mod")
def modulo(op: Op) -> fx.Node:
    return op.call(aten.fmod.Tensor if op.attribute("fmod", 0) else aten.remainder.Tensor, *op.tensors())


@operator("Pow")
def power(op: Op) -> fx.Node:
    if op.is_known(1) and op.known(1).size == 1 and op.rank(1) <= op.rank(0):
        exponent = op.scalar(1)
        is_whole = op.builder.dtype(op.value(0)).is_floating_point is False
        return op.call(aten.pow.Tensor_Scalar, op.tensor(0), int(exponent) if is_whole else float(exponent))
    return op.call(aten.pow.Tensor_Tensor, *op.tensors())


@operator("Where")
def where(op: Op) -> fx.Node:
    return op.call(aten.where.self, *op.tensors())


@operator("Cast", "CastLike")
def cast(op: Op) -> fx.Node | Known:
    dtype = op.builder.dtype(op.value(1)) if op.node.op_type == "CastLike" else _cast_target(op)
    if op.builder.dtype(op.value(0)) == dtype:
        return op.value(0)
    return op.call(aten._to_copy.default, op.tensor(0), dtype=dtype)


def _cast_target(op: Op) -> torch.dtype:
    number = op.attribute("to")
    if number not in DTYPES:
        op.refuse(f"attribute to={onnx.TensorProto.DataType.Name(number)}: {FLOAT32_ONLY}")
    return DTYPES[number]
