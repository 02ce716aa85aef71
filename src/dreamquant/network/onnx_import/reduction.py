"""Reductions over axes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Known, Op, operator

aten = torch.ops.aten

Reduce = Callable[[Op, list[int], bool], fx.Node]


def _sum(op: Op, node: fx.Node, axes: list[int], keep: bool) -> fx.Node:
    return op.call(aten.sum.dim_IntList, node, axes, keep)


def _product(op: Op, axes: list[int], keep: bool) -> fx.Node:
    return functools.reduce(lambda node, axis: op.call(aten.prod.dim_int, node, axis, keep), reversed(axes), op.tensor(0))


def _square(op: Op) -> fx.Node:
    return op.call(aten.mul.Tensor, op.tensor(0), op.tensor(0))


REDUCTIONS: dict[str, Reduce] = {
    "ReduceMean": lambda op, axes, keep: op.call(aten.mean.dim, op.tensor(0), axes, keep),
    "ReduceSum": lambda op, axes, keep: _sum(op, op.tensor(0), axes, keep),
    "ReduceMax": lambda op, axes, keep: op.call(aten.amax.default, op.tensor(0), axes, keep),
    "ReduceMin": lambda op, axes, keep: op.call(aten.amin.default, op.tensor(0), axes, keep),
    "ReduceProd": _product,
    "ReduceL1": lambda op, axes, keep: op.call(aten.linalg_vector_norm.default, op.tensor(0), 1, axes, keep),
    "ReduceL2": lambda op, axes, keep: op.call(aten.linalg_vector_norm.default, op.tensor(0), 2, axes, keep),
    "ReduceSumSquare": lambda op, axes, keep: _sum(op, _square(op), axes, keep),
    "ReduceLogSum": lambda op, axes, keep: op.call(aten.log.default, _sum(op, op.tensor(0), axes, keep)),
    "ReduceLogSumExp": lambda op, axes, keep: op.call(aten.logsumexp.default, op.tensor(0), axes, keep),
}


@operator(*REDUCTIONS)
def reduce(op: Op) -> fx.Node | Known:
    axes = op.axes(1)
    if not axes:
        if op.attribute("noop_with_empty_axes", 0):
            return op.value(0)
        axes = list(range(op.rank()))
    return REDUCTIONS[op.node.op_type](op, axes, bool(op.attribute("keepdims", 1)))


@operator("ArgMax", "ArgMin")
def extreme(op: Op) -> fx.Node:
    if op.attribute("select_last_index", 0):
        op.refuse("attribute select_last_index=1; only the first index of equal ones can be computed")
    target = aten.argmax.default if op.node.op_type == "ArgMax" else aten.argmin.default
    return op.call(target, op.tensor(0), op.axis(0), bool(op.attribute("keepdims", 1)))


@operator("CumSum")
def cumulative_sum(op: Op) -> fx.Node:
    for name in ("exclusive", "reverse"):
        if op.attribute(name, 0):
            op.refuse(f"attribute {name}=1; only plain cumulative sums are known")
    return op.call(aten.cumsum.default, op.tensor(0), int(op.scalar(1)))
