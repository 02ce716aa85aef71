"""Max and average pools, over windows and over whole images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Op, operator
from dreamquant.network.onnx_import.windows import Window, padded, window

aten = torch.ops.aten

MAX_POOLS = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
AVERAGE_POOLS = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


def _window(op: Op) -> Window:
    kernel = op.attribute("kernel_shape")
    if len(kernel) not in MAX_POOLS:
        op.refuse(f"attribute kernel_shape={kernel} has {len(kernel)} dimensions; 1, 2 and 3 are known")
    win = window(op, kernel)
    if not win.symmetric and op.attribute("ceil_mode", 0):
        op.refuse("attribute ceil_mode=1 together with unequal padding at the two ends")
    return win


@operator("MaxPool")
def max_pool(op: Op) -> fx.Node:
    op.only_first_output()
    win = _window(op)
    images, padding = padded(op, op.tensor(0), win, -math.inf)
    ceil = bool(op.attribute("ceil_mode", 0))
    return op.call(MAX_POOLS[len(win.kernel)], images, win.kernel, win.strides, padding, win.dilations, ceil)


@operator("AveragePool")
def average_pool(op: Op) -> fx.Node:
    win = _window(op)
    if set(win.dilations) != {1}:
        op.refuse(f"attribute dilations={win.dilations}; average pools are only known without dilation")
    images, padding = padded(op, op.tensor(0), win)
    ceil, whole = bool(op.attribute("ceil_mode", 0)), bool(op.attribute("count_include_pad", 0))
    node = op.call(AVERAGE_POOLS[len(win.kernel)], images, win.kernel, win.strides, padding, ceil, whole)
    if win.symmetric or whole:
        return node
    return op.call(aten.mul.Tensor, node, op.constant("rescale", _share_of_padding(op, win)))


def _share_of_padding(op: Op, win: Window) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Per window: its size over how many of its pixels lie in the image. (1, 1, *spatial)"""
    inside = torch.nn.functional.pad(torch.ones(1, 1, *op.shape(0)[2:]), win.padding)
    return (1 / AVERAGE_POOLS[len(win.kernel)](inside, win.kernel, win.strides)).numpy()  # type: ignore[no-any-return]


@operator("GlobalAveragePool")
def global_average_pool(op: Op) -> fx.Node:
    if op.rank() == 4:
        return op.call(aten.adaptive_avg_pool2d.default, op.tensor(0), [1, 1])
    return op.call(aten.mean.dim, op.tensor(0), list(range(2, op.rank())), True)


@operator("GlobalMaxPool")
def global_max_pool(op: Op) -> fx.Node:
    return op.call(aten.amax.default, op.tensor(0), list(range(2, op.rank())), True)
