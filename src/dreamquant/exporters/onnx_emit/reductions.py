"""Means, sums, extremes, norms and variances over dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Operand, Value, emits, refuse
from dreamquant.network.graph import aten

Dims = Sequence[int] | int | None


def axes_of(x: Value, dims: Dims) -> list[int]:
    """ATen's dimensions counted from the front; None or an empty list are all of them."""
    items = [dims] if isinstance(dims, int) else list(dims or range(x.rank))
    return sorted(x.axis(dim) for dim in items)


def reduced(g: Builder, op_type: str, x: Operand, axes: Sequence[int], keepdim: bool) -> str:
    """A reducing node; only ReduceSum takes its axes as an input before opset 18."""
    return g.axes(op_type, x, axes, since=13 if op_type == "ReduceSum" else 18, keepdims=int(keepdim))


@emits(aten.mean.dim, aten.mean.default)
def mean(g: Builder, x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> str:
    """Over the pixels of images: GlobalAveragePool, which has an integer form; then, without keepdim, Squeeze, through
    which ONNX Runtime moves the quantization of the result back to the pooling (not so Flatten)."""
    axes = axes_of(x, dims)
    if x.rank < 3 or axes != list(range(2, x.rank)) or x.dtype != g.dtype:
        return reduced(g, "ReduceMean", g.cast(x, g.dtype), axes, keepdim)
    pooled = g.op("GlobalAveragePool", x)
    return pooled if keepdim else g.axes("Squeeze", pooled, axes)


@emits(aten.sum.dim_IntList, aten.sum.default)
def total(g: Builder, x: Value, dims: Dims = None, keepdim: bool = False, **_: Any) -> str:
    return reduced(g, "ReduceSum", g.cast(x, g.dtype), axes_of(x, dims), keepdim)


@emits(aten.amax.default, aten.max.default)
def amax(g: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> str:
    return reduced(g, "ReduceMax", x, axes_of(x, dims), keepdim)


@emits(aten.amin.default, aten.min.default)
def amin(g: Builder, x: Value, dims: Dims = None, keepdim: bool = False) -> str:
    return reduced(g, "ReduceMin", x, axes_of(x, dims), keepdim)


@emits(aten.max.dim)
def max_dim(g: Builder, x: Value, dim: int, keepdim: bool = False) -> list[str | None]:
    indices = g.op("ArgMax", x, axis=dim, keepdims=int(keepdim)) if 1 in g.used else None
    return [reduced(g, "ReduceMax", x, axes_of(x, dim), keepdim), indices]


@emits(aten.argmax.default)
def argmax(g: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
    return refuse("without a dimension") if dim is None else g.op("ArgMax", x, axis=dim, keepdims=int(keepdim))


@emits(aten.argmin.default)
def argmin(g: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
    return refuse("without a dimension") if dim is None else g.op("ArgMin", x, axis=dim, keepdims=int(keepdim))


@emits(aten.topk.default)
def topk(g: Builder, x: Value, count: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> list[str | None]:
    found = g.ops("TopK", x, g.ints([count]), outputs=2, axis=dim, largest=int(largest), sorted=int(ordered))
    return [*found]


@emits(aten.prod.dim_int)
def prod(g: Builder, x: Value, dim: int, keepdim: bool = False, **_: Any) -> str:
    return reduced(g, "ReduceProd", g.cast(x, g.dtype), axes_of(x, dim), keepdim)


@emits(aten.logsumexp.default)
def logsumexp(g: Builder, x: Value, dims: Dims, keepdim: bool = False) -> str:
    return reduced(g, "ReduceLogSumExp", x, axes_of(x, dims), keepdim)


@emits(aten.linalg_vector_norm.default)
def vector_norm(g: Builder, x: Value, order: float = 2, dims: Dims = None, keepdim: bool = False, **_: Any) -> str:
    axes = axes_of(x, dims)
    if order == math.inf:
        return reduced(g, "ReduceMax", g.op("Abs", x), axes, keepdim)
    if order not in (1, 2):
        refuse(f"the norm of order {order} (known: 1, 2, inf)")
    return reduced(g, f"ReduceL{int(order)}", g.cast(x, g.dtype), axes, keepdim)


@emits(aten.norm.ScalarOpt_dim)
def norm(g: Builder, x: Value, order: float | None, dims: Dims, keepdim: bool = False) -> str:
    return vector_norm(g, x, 2 if order is None else order, dims, keepdim)


@emits(aten.var.correction)
def var(g: Builder, x: Value, dims: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> str:
    return _variance(g, x, dims, 1 if correction is None else correction, keepdim)


@emits(aten.var.dim)
def var_dim(g: Builder, x: Value, dims: Dims, unbiased: bool = True, keepdim: bool = False) -> str:
    return _variance(g, x, dims, int(unbiased), keepdim)


@emits(aten.std.correction)
def std(g: Builder, x: Value, dims: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> str:
    return g.op("Sqrt", _variance(g, x, dims, 1 if correction is None else correction, keepdim))


@emits(aten.std.dim)
def std_dim(g: Builder, x: Value, dims: Dims, unbiased: bool = True, keepdim: bool = False) -> str:
    return g.op("Sqrt", _variance(g, x, dims, int(unbiased), keepdim))


def _variance(g: Builder, x: Value, dims: Dims, correction: float, keepdim: bool) -> str:
    axes = axes_of(x, dims)
    count = math.prod(x.size(axis) for axis in axes)
    centred = g.op("Sub", x, reduced(g, "ReduceMean", x, axes, True))
    spread = reduced(g, "ReduceSum", g.op("Mul", centred, centred), axes, keepdim)
    return g.op("Div", spread, g.const(float(count - correction), x.dtype))


@emits(aten.var_mean.correction)
def var_mean(
    g: Builder, x: Value, dims: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> list[str | None]:
    variance = _variance(g, x, dims, 1 if correction is None else correction, keepdim)
    return [variance, reduced(g, "ReduceMean", x, axes_of(x, dims), keepdim)]


@emits(aten.cumsum.default)
def cumsum(g: Builder, x: Value, dim: int, **_: Any) -> str:
    return g.op("CumSum", g.cast(x, g.dtype), g.const(x.axis(dim), torch.int64, "axis"))
