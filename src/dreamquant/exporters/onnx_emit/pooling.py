"""Pooling and resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Operand, Value, emits, ints_of, refuse
from dreamquant.network.graph import aten


@emits(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    g: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> str:
    spatial = _spatial(g, x)
    size, pads, reach = ints_of(kernel, spatial), ints_of(padding, spatial), ints_of(dilation, spatial)
    steps = ints_of(stride or size, spatial)
    end = _end_pads(x, size, steps, pads, reach) if ceil_mode else pads
    return g.op("MaxPool", x, kernel_shape=size, strides=steps, pads=pads + end, dilations=reach)


@emits(aten.max_pool2d_with_indices.default)
def max_pool_with_indices(g: Builder, x: Value, *args: Any) -> list[str | None]:
    return [max_pool(g, x, *args), None]


@emits(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    g: Builder,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    spatial = _spatial(g, x)
    size, pads = ints_of(kernel, spatial), ints_of(padding, spatial)
    steps = ints_of(stride or size, spatial)
    end = _end_pads(x, size, steps, pads, [1] * spatial) if ceil_mode else pads
    source: Operand = x
    include = count_include_pad
    if divisor_override is not None:
        include = True
    elif include and end != pads:  # the padding asked for counts, what ceil_mode adds does not
        source = g.op("Pad", x, g.ints([0, 0, *pads, 0, 0, *pads], "pads"))
        pads, end, include = [0] * spatial, [e - p for e, p in zip(end, pads, strict=True)], False
    pooled = g.op("AveragePool", source, kernel_shape=size, strides=steps, pads=pads + end, count_include_pad=int(include))
    if divisor_override is None:
        return pooled
    return g.op("Mul", pooled, g.const(math.prod(size) / divisor_override, x.dtype))


def _spatial(g: Builder, x: Value) -> int:
    """How many dimensions a pooling runs over; the batch has to be there."""
    rank = int(str(g.current.target).split("pool")[1][0]) + 2
    return x.rank - 2 if x.rank == rank else refuse(f"an input of shape {x.shape} without the batch dimension")


def _end_pads(x: Value, size: Sequence[int], steps: Sequence[int], pads: Sequence[int], reach: Sequence[int]) -> list[int]:
    """The padding behind that makes a pooling that rounds down give the sizes torch's ceil_mode gives."""
    ends = []
    for i, (given, step, pad) in enumerate(zip(x.shape[2:], steps, pads, strict=True)):
        extent = reach[i] * (size[i] - 1) + 1
        length = given if given is not None else refuse("its size depends on the batch")
        count = -(-(length + 2 * pad - extent) // step) + 1
        if (count - 1) * step >= length + pad:  # torch drops a window that would begin behind the input
            count -= 1
        ends.append(max(pad, (count - 1) * step + extent - length - pad))
    return ends


@emits(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool(g: Builder, x: Value, output_size: Any) -> str:
    spatial = _spatial(g, x)
    sizes, targets = [x.size(2 + i) for i in range(spatial)], _targets(x, output_size, spatial)
    if all(target == 1 for target in targets):
        return g.op("GlobalAveragePool", x)
    if sizes == targets:
        return g.op("Identity", x)
    if all(size % target == 0 for size, target in zip(sizes, targets, strict=True)):
        steps = [size // target for size, target in zip(sizes, targets, strict=True)]
        return g.op("AveragePool", x, kernel_shape=steps, strides=steps)
    columns = g.const(_window_means(sizes[-1], targets[-1]).T, x.dtype, "columns")
    pooled = g.op("MatMul", x, columns)
    if spatial == 1:
        return pooled
    return g.op("MatMul", g.const(_window_means(sizes[0], targets[0]), x.dtype, "rows"), pooled)


def _targets(x: Value, output_size: Any, spatial: int) -> list[int]:
    given = output_size if isinstance(output_size, tuple | list) else [output_size]
    items = list(given) * (spatial if len(given) == 1 else 1)
    return [x.size(2 + i) if item is None else int(item) for i, item in enumerate(items)]


def _window_means(size: int, target: int) -> torch.Tensor:
    """The matrix (target, size) whose rows take the mean of torch's adaptive windows, which may overlap."""
    matrix = torch.zeros(target, size)
    for row in range(target):
        begin, end = row * size // target, -(-(row + 1) * size // target)
        matrix[row, begin:end] = 1 / (end - begin)
    return matrix


@emits(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
def adaptive_max_pool(g: Builder, x: Value, output_size: Any) -> list[str | None]:
    spatial = _spatial(g, x)
    targets = _targets(x, output_size, spatial)
    if all(target == 1 for target in targets):
        return [g.op("GlobalMaxPool", x), None]
    if any(x.size(2 + i) % target for i, target in enumerate(targets)):
        refuse(f"output size {targets} does not divide the input {x.shape[2:]}")
    steps = [x.size(2 + i) // target for i, target in enumerate(targets)]
    return [g.op("MaxPool", x, kernel_shape=steps, strides=steps), None]


@emits(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec)
def nearest_vec(g: Builder, x: Value, _size: Any, scale_factors: Sequence[float] | None) -> str:
    return _resize(g, x, scale_factors, "asymmetric", mode="nearest", nearest_mode="floor")


@emits(aten.upsample_nearest2d.default)
def nearest(g: Builder, x: Value, _size: Any, *scales: float | None) -> str:
    return _resize(g, x, scales, "asymmetric", mode="nearest", nearest_mode="floor")


@emits(aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec)
def bilinear_vec(g: Builder, x: Value, _size: Any, align_corners: bool, scales: Sequence[float | None] | None) -> str:
    return _resize(g, x, scales, "align_corners" if align_corners else "half_pixel", mode="linear")


@emits(aten.upsample_bilinear2d.default)
def bilinear(g: Builder, x: Value, _size: Any, align_corners: bool, *scales: float | None) -> str:
    return bilinear_vec(g, x, _size, align_corners, scales)


@emits(aten.upsample_bicubic2d.vec)
def bicubic_vec(g: Builder, x: Value, _size: Any, align_corners: bool, scales: Sequence[float | None] | None) -> str:
    grid = "align_corners" if align_corners else "half_pixel"
    return _resize(g, x, scales, grid, mode="cubic", cubic_coeff_a=-0.75)


def _resize(g: Builder, x: Value, scales: Sequence[float | None] | None, grid: str, **attributes: Any) -> str:
    """Resize by the factors torch uses; by the sizes where these alone decide."""
    sizes = [size or refuse("its size depends on the batch") for size in g.fact.shape[2:]]
    inputs = [x.size(2 + i) for i in range(x.rank - 2)]
    ratios = [size / given for size, given in zip(sizes, inputs, strict=True)]
    known = list(scales) if scales else [None] * len(sizes)
    factors = [ratio if factor is None else float(factor) for factor, ratio in zip(known, ratios, strict=True)]
    attributes["coordinate_transformation_mode"] = grid
    if grid != "align_corners" and _reaches(inputs, factors, sizes):
        return g.op("Resize", x, None, g.const([1.0, 1.0, *factors], torch.float32, "scales"), **attributes)
    if grid != "align_corners" and any(factor is not None for factor in known):
        refuse(f"from {inputs} by {factors} to {sizes} is not a size that these factors give")
    return g.op("Resize", x, None, None, g.shape_of((*x.shape[:2], *sizes), x), **attributes)


def _reaches(inputs: Sequence[int], factors: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether all runtimes get to `sizes` that multiply and round down, in float32 or in more."""
    for given, factor, size in zip(inputs, factors, sizes, strict=True):
        single, double = np.float32(given) * np.float32(factor), given * float(np.float32(factor))
        if int(np.floor(single)) != size or int(np.floor(double)) != size:
            return False
    return True
