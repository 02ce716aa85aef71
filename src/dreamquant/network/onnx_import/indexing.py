"""Operators that look elements up: Gather and its kin, TopK."""

from __future__ import annotations

import operator as python

import numpy as np
import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Op, operator

aten = torch.ops.aten


@operator("Gather")
def gather(op: Op) -> fx.Node:
    axis = op.axis(0)
    if op.is_known(1):
        return _gather_known(op, axis)
    if axis == 0 and op.rank() == 2:
        return op.call(aten.embedding.default, op.tensor(0), op.tensor(1))
    if op.rank(1) == 1:
        return op.call(aten.index_select.default, op.tensor(0), axis, op.tensor(1))
    flat = op.call(aten.reshape.default, op.tensor(1), [-1])
    return _unflattened(op, op.call(aten.index_select.default, op.tensor(0), axis, flat), axis)


def _gather_known(op: Op, axis: int) -> fx.Node:
    indices, length = op.known(1), op.shape(0)[axis]
    if indices.ndim == 0:
        return op.call(aten.select.int, op.tensor(0), axis, int(indices))
    flat = np.where(indices < 0, indices + length, indices).ravel()
    stored = op.tensor(1) if np.array_equal(flat, indices) else op.constant("indices", flat)
    picked = op.call(aten.index_select.default, op.tensor(0), axis, stored)
    return picked if indices.ndim == 1 else _unflattened(op, picked, axis)


def _unflattened(op: Op, picked: fx.Node, axis: int) -> fx.Node:
    if not op.shape(1):
        return op.call(aten.squeeze.dims, picked, [axis])
    return op.call(aten.unflatten.int, picked, axis, list(op.shape(1)))


@operator("GatherElements")
def gather_elements(op: Op) -> fx.Node:
    return op.call(aten.gather.default, op.tensor(0), op.axis(0), op.tensor(1))


@operator("TopK")
def top(op: Op) -> list[fx.Node]:
    largest, in_order = bool(op.attribute("largest", 1)), bool(op.attribute("sorted", 1))
    node = op.call(aten.topk.default, op.tensor(0), int(op.scalar(1)), op.axis(-1), largest, in_order)
    return [op.call(python.getitem, node, index) for index in (0, 1)]
