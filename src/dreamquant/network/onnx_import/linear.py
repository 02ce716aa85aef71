"""Matrix products: Gemm, MatMul, Einsum."""

from __future__ import annotations

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Known, Op, operator

aten = torch.ops.aten


def _weight(op: Op, *, transposed: bool) -> fx.Node | None:
    """Input 1 as a stored matrix (out, in), where it is a constant matrix; `transposed`: the file has (out, in) too."""
    value = op.value(1)
    if not isinstance(value, Known) or value.array.ndim != 2:
        return None
    return op.builder.stored(value, transposed=not transposed)


@operator("MatMul")
def matmul(op: Op) -> fx.Node:
    weight = _weight(op, transposed=False) if op.rank(0) > 1 else None
    if weight is None:
        return op.call(aten.matmul.default, op.tensor(0), op.tensor(1))
    return op.call(aten.linear.default, op.tensor(0), weight, None)


@operator("Gemm")
def gemm(op: Op) -> fx.Node:
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    left = op.tensor(0)
    if op.attribute("transA", 0):
        left = op.call(aten.permute.default, left, [1, 0])
    weight = _weight(op, transposed=bool(op.attribute("transB", 0)))
    if weight is not None and alpha == beta == 1 and _is_bias(op):
        return op.call(aten.linear.default, left, weight, op.optional(2))
    product = op.call(aten.linear.default, left, weight, None) if weight is not None else _product(op, left)
    if alpha != 1:
        product = op.call(aten.mul.Tensor, product, alpha)
    return _plus(op, product, beta)


def _is_bias(op: Op) -> bool:
    return not op.has(2) or (op.rank(2) == 1 and op.shape(2)[0] == op.shape(1)[0 if op.attribute("transB", 0) else 1])


def _product(op: Op, left: fx.Node) -> fx.Node:
    right = op.tensor(1)
    if op.attribute("transB", 0):
        right = op.call(aten.permute.default, right, [1, 0])
    return op.call(aten.matmul.default, left, right)


def _plus(op: Op, product: fx.Node, beta: float) -> fx.Node:
    if not op.has(2) or beta == 0:
        return product
    bias = op.tensor(2)
    if beta != 1:
        bias = op.call(aten.mul.Tensor, bias, beta)
    return op.call(aten.add.Tensor, product, bias)


@operator("Einsum")
def einsum(op: Op) -> fx.Node:
    return op.call(aten.einsum.default, op.attribute("equation").replace(" ", ""), op.tensors())
