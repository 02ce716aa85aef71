"""Operators that give values another shape or order: reshape, transpose, expand, repeat, shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreamquant.exporters.onnx_emit.builder import Builder, Operand, Symbol, Value, emits, refuse
from dreamquant.network.graph import aten

Size = int | Symbol


@emits(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(g: Builder, x: Value, sizes: Sequence[Size]) -> str:
    return g.reshape(x, g.fact.shape, sizes)


@emits(aten.flatten.using_ints)
def flatten(g: Builder, x: Value, _start: int = 0, _end: int = -1) -> str:
    return g.reshape(x, g.fact.shape)


@emits(aten.unflatten.int)
def unflatten(g: Builder, x: Value, _dim: int, _sizes: Sequence[Size]) -> str:
    return g.reshape(x, g.fact.shape)


@emits(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(g: Builder, x: Value, dims: Sequence[int] | int | None = None) -> str:
    asked = range(x.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = sorted(x.axis(dim) for dim in asked if x.rank and x.shape[dim] == 1)
    return g.axes("Squeeze", x, axes) if axes else g.op("Identity", x)


@emits(aten.unsqueeze.default)
def unsqueeze(g: Builder, x: Value, dim: int) -> str:
    return g.axes("Unsqueeze", x, [dim % (x.rank + 1)])


@emits(aten.permute.default)
def permute(g: Builder, x: Value, dims: Sequence[int]) -> str:
    return g.op("Transpose", x, perm=[x.axis(dim) for dim in dims])


@emits(aten.transpose.int)
def transpose(g: Builder, x: Value, first: int, second: int) -> str:
    order = list(range(x.rank))
    order[first], order[second] = order[second], order[first]
    return g.op("Transpose", x, perm=order)


@emits(aten.t.default)
def matrix_transpose(g: Builder, x: Value) -> str:
    return g.op("Transpose", x, perm=[1, 0]) if x.rank == 2 else g.op("Identity", x)


@emits(aten.expand.default)
def expand(g: Builder, x: Value, sizes: Sequence[Size], **_: Any) -> str:
    return g.op("Expand", x, g.dims([1 if size == -1 else size for size in sizes]))  # ONNX keeps a dimension by a 1


@emits(aten.expand_as.default)
def expand_as(g: Builder, x: Value, other: Value) -> str:
    return g.op("Expand", x, g.shape_of(g.fact.shape, other))


@emits(aten.reshape_as.default, aten.view_as.default)
def reshape_as(g: Builder, x: Value, other: Value) -> str:
    return g.op("Reshape", x, g.shape_of(g.fact.shape, other))


@emits(aten.repeat.default)
def repeat(g: Builder, x: Value, repeats: Sequence[Size]) -> str:
    missing = len(repeats) - x.rank
    source: Operand = g.axes("Unsqueeze", x, list(range(missing))) if missing else x
    return g.op("Tile", source, g.dims(repeats, "repeats"))


@emits(aten.repeat_interleave.self_int)
def repeat_interleave(g: Builder, x: Value, repeats: int, dim: int | None = None, **_: Any) -> str:
    if dim is None:
        return refuse("without a dimension")
    axis = x.axis(dim)
    tiles = [1] * (x.rank + 1)
    tiles[axis + 1] = repeats
    tiled = g.op("Tile", g.axes("Unsqueeze", x, [axis + 1]), g.ints(tiles, "repeats"))
    return g.reshape(tiled, g.fact.shape)


@emits(aten.pixel_shuffle.default)
def pixel_shuffle(g: Builder, x: Value, factor: int) -> str:
    return g.op("DepthToSpace", _images(x), blocksize=factor, mode="CRD")


@emits(aten.pixel_unshuffle.default)
def pixel_unshuffle(g: Builder, x: Value, factor: int) -> str:
    batch, channels, height, width = _images(x).shape[0], x.size(1), x.size(2) // factor, x.size(3) // factor
    blocks = g.reshape(x, (batch, channels, height, factor, width, factor))
    return g.reshape(g.op("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4]), g.fact.shape)


@emits(aten.channel_shuffle.default)
def channel_shuffle(g: Builder, x: Value, groups: int) -> str:
    wide = g.reshape(x, (_images(x).shape[0], groups, x.size(1) // groups, *x.shape[2:]))
    return g.reshape(g.op("Transpose", wide, perm=[0, 2, 1, 3, 4]), x.shape)


def _images(x: Value) -> Value:
    return x if x.rank == 4 else refuse(f"an input of shape {x.shape}, not images (N, C, H, W)")
