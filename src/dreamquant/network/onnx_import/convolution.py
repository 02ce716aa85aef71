"""Conv and ConvTranspose."""

from __future__ import annotations

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Op, operator
from dreamquant.network.onnx_import.windows import Window, interleaved, padded, window

aten = torch.ops.aten

CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def _spatial(op: Op) -> int:
    rank = op.rank(1) - 2
    if rank not in CONVOLUTIONS:
        op.refuse(f"the kernel has {rank} spatial dimensions; 1, 2 and 3 are known")
    return rank


@operator("Conv")
def convolution(op: Op) -> fx.Node:
    target = CONVOLUTIONS[_spatial(op)]
    win = window(op, op.shape(1)[2:])
    images, padding = padded(op, op.tensor(0), win)
    groups = op.attribute("group", 1)
    return op.call(target, images, op.tensor(1), op.optional(2), win.strides, padding, win.dilations, groups)


@operator("ConvTranspose")
def transposed_convolution(op: Op) -> fx.Node:
    target = TRANSPOSED[_spatial(op)]
    extra = op.attribute("output_padding", [0] * (op.rank(1) - 2))
    win = _transposed_window(op, extra)
    padding = win.before if win.symmetric else [0] * len(extra)
    weights = op.tensor(1), op.optional(2)
    groups = op.attribute("group", 1)
    node = op.call(target, op.tensor(0), *weights, win.strides, padding, extra, groups, win.dilations)
    if win.symmetric:
        return node
    crop = interleaved([-amount for amount in win.before], [-amount for amount in win.after])
    return op.call(aten.pad.default, node, crop)


def _transposed_window(op: Op, extra: list[int]) -> Window:
    win = _unpadded(op)
    full = [
        stride * (size - 1) + more + (k - 1) * dilation + 1
        for size, stride, more, k, dilation in zip(op.shape(0)[2:], win.strides, extra, win.kernel, win.dilations, strict=True)
    ]
    sizes = op.attribute("output_shape")
    mode = op.attribute("auto_pad", "NOTSET")
    if sizes is None and mode in ("NOTSET", "VALID"):
        return window(op, win.kernel)
    sizes = sizes or [size * stride for size, stride in zip(op.shape(0)[2:], win.strides, strict=True)]
    totals = [one - size for one, size in zip(full, sizes, strict=True)]
    if min(totals) < 0:
        op.refuse(f"attribute output_shape={sizes} is larger than what the kernel writes, {full}")
    halves, rests = [total // 2 for total in totals], [total - total // 2 for total in totals]
    before, after = (halves, rests) if mode == "SAME_UPPER" else (rests, halves)
    return Window(win.kernel, win.strides, win.dilations, before, after)


def _unpadded(op: Op) -> Window:
    kernel = list(op.shape(1)[2:])
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    return Window(kernel, op.attribute("strides", ones), op.attribute("dilations", ones), zeros, zeros)
