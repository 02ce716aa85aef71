"""Operators that move elements without changing them: shapes, orders, joins, cuts, borders."""

from __future__ import annotations

import math
import operator as python

import numpy as np
import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Known, Op, operator
from dreamquant.network.onnx_import.windows import interleaved

aten = torch.ops.aten


@operator("Shape")
def shape(op: Op) -> Known:
    sizes = op.shape(0)[op.attribute("start", 0) : op.attribute("end")]
    return Known(op.node.output[0], np.array(sizes, np.int64))


@operator("Size")
def size(op: Op) -> Known:
    return Known(op.node.output[0], np.array(math.prod(op.shape(0)), np.int64))


@operator("Reshape")
def reshape(op: Op) -> fx.Node:
    sizes = op.integers(1)
    if not op.attribute("allowzero", 0):
        sizes = [given or op.shape(0)[axis] for axis, given in enumerate(sizes)]
    return op.call(aten.reshape.default, op.tensor(0), sizes)


@operator("Flatten")
def flatten(op: Op) -> fx.Node:
    axis = op.axis(1)
    if axis == 1 and op.rank() > 1:
        return op.call(aten.flatten.using_ints, op.tensor(0), 1)
    return op.call(aten.reshape.default, op.tensor(0), [math.prod(op.shape(0)[:axis]), -1])


@operator("Transpose")
def transpose(op: Op) -> fx.Node:
    return op.call(aten.permute.default, op.tensor(0), op.attribute("perm", list(reversed(range(op.rank())))))


@operator("Squeeze")
def squeeze(op: Op) -> fx.Node:
    axes = op.axes(1)
    if axes is None:
        axes = [axis for axis, length in enumerate(op.shape(0)) if length == 1]
    return op.call(aten.squeeze.dims, op.tensor(0), axes)


@operator("Unsqueeze")
def unsqueeze(op: Op) -> fx.Node | Known:
    axes = op.integers(1) if op.has(1) else op.attribute("axes")
    rank, node = op.rank() + len(axes), op.tensor(0)
    for axis in sorted(axis % rank for axis in axes):
        node = op.call(aten.unsqueeze.default, node, axis)
    return node


@operator("Expand")
def expand(op: Op) -> fx.Node | Known:
    value, given = op.value(0), op.shape(0)
    sizes = list(np.broadcast_shapes(given, tuple(op.integers(1))))
    if isinstance(value, Known):
        return Known(op.node.output[0], np.broadcast_to(value.array, sizes), value)
    added = len(sizes) - len(given)
    kept = [-1 if axis >= added and length == given[axis - added] else length for axis, length in enumerate(sizes)]
    return op.call(aten.expand.default, op.tensor(0), kept)


@operator("Tile")
def tile(op: Op) -> fx.Node:
    return op.call(aten.repeat.default, op.tensor(0), op.integers(1))


@operator("Concat")
def concat(op: Op) -> fx.Node:
    return op.call(aten.cat.default, op.tensors(), op.axis(0))


@operator("Split")
def split(op: Op) -> list[fx.Node]:
    axis = op.axis(0)
    node = op.call(aten.split_with_sizes.default, op.tensor(0), _parts(op, op.shape(0)[axis]), axis)
    return [op.call(python.getitem, node, index) for index in range(len(op.node.output))]


def _parts(op: Op, length: int) -> list[int]:
    sizes = op.integers(1) if op.has(1) else op.attribute("split")
    if sizes is not None:
        return list(sizes)
    count = op.attribute("num_outputs", len(op.node.output))
    part = -(-length // count)
    return [part] * (count - 1) + [length - part * (count - 1)]


@operator("Slice")
def slice_(op: Op) -> fx.Node | Known:
    starts, ends = op.integers(1), op.integers(2)
    axes = op.integers(3) if op.has(3) else list(range(len(starts)))
    steps = op.integers(4) if op.has(4) else [1] * len(starts)
    if not starts:
        return op.value(0)
    node = op.tensor(0)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        node = _cut(op, node, axis % op.rank(), start, end, step)
    return node


def _cut(op: Op, node: fx.Node, axis: int, start: int, end: int, step: int) -> fx.Node:
    if step > 0:
        return op.call(aten.slice.Tensor, node, axis, start, end, step)
    length = op.shape(0)[axis]
    first, last, _ = slice(start, end, step).indices(length)
    flipped = op.call(aten.flip.default, node, [axis])
    return op.call(aten.slice.Tensor, flipped, axis, length - 1 - first, length - 1 - last, -step)


PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad")
def pad(op: Op) -> fx.Node:
    mode = op.attribute("mode", "constant")
    if mode not in PAD_MODES:
        op.refuse(f"attribute mode={mode!r}; known: {', '.join(PAD_MODES)}")
    amounts = _border(op, mode)
    if mode != "constant":
        return op.call(aten.pad.default, op.tensor(0), amounts, PAD_MODES[mode])
    value = op.scalar(2) if op.has(2) else 0.0
    return op.call(aten.pad.default, op.tensor(0), amounts, "constant", float(value))


def _border(op: Op, mode: str) -> list[int]:
    pads, rank = op.integers(1), op.rank()
    axes = [axis % rank for axis in op.integers(3)] if op.has(3) else list(range(rank))
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        before[axis], after[axis] = pads[index], pads[index + len(axes)]
    padded = [axis for axis in range(rank) if before[axis] or after[axis]]
    start = min(padded, default=rank - 1)
    if mode != "constant":  # torch pads all spatial dimensions of a batch, or none of it
        if start < 2 or rank > 5:
            op.refuse(f"attribute mode={mode!r} on axes {padded} of a {rank}-dimensional input; only spatial axes are known")
        start = 2
    return interleaved(before[start:], after[start:])


@operator("DepthToSpace")
def depth_to_space(op: Op) -> fx.Node:
    side, images = op.attribute("blocksize"), op.tensor(0)
    if op.attribute("mode", "DCR") == "CRD":
        return op.call(aten.pixel_shuffle.default, images, side)
    batch, depth, height, width = op.shape(0)
    channels = depth // side**2
    blocks = op.call(aten.reshape.default, images, [batch, side, side, channels, height, width])
    ordered = op.call(aten.permute.default, blocks, [0, 3, 4, 1, 5, 2])
    return op.call(aten.reshape.default, ordered, [batch, channels, height * side, width * side])


@operator("SpaceToDepth")
def space_to_depth(op: Op) -> fx.Node:
    side, (batch, channels, height, width) = op.attribute("blocksize"), op.shape(0)
    high, wide = height // side, width // side
    blocks = op.call(aten.reshape.default, op.tensor(0), [batch, channels, high, side, wide, side])
    ordered = op.call(aten.permute.default, blocks, [0, 3, 5, 1, 2, 4])
    return op.call(aten.reshape.default, ordered, [batch, channels * side**2, high, wide])


@operator("Trilu")
def triangle(op: Op) -> fx.Node:
    target = aten.triu.default if op.attribute("upper", 1) else aten.tril.default
    return op.call(target, op.tensor(0), int(op.scalar(1)) if op.has(1) else 0)
