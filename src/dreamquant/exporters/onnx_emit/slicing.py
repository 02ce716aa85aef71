"""Operators that take parts, join parts, pad and roll, and constants whose shape depends on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Operand, Symbol, Value, emits, refuse
from dreamquant.network.graph import aten

END = 2**63 - 1
Size = int | Symbol
PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@emits(aten.slice.Tensor)
def slice_(g: Builder, x: Value, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1) -> str:
    first, last = 0 if start is None else start, END if end is None else end
    if (first, last, step) == (0, END, 1):
        return g.op("Identity", x)
    return _slice(g, x, x.axis(dim), first, last, step)


def _slice(g: Builder, x: Operand, axis: int, start: Size, end: Size, step: int = 1) -> str:
    bounds = g.dims([start], "starts"), g.dims([end], "ends")
    return g.op("Slice", x, *bounds, g.ints([axis], "axes"), g.ints([step], "steps"))


@emits(aten.select.int)
def select(g: Builder, x: Value, dim: int, index: Size) -> str:
    return g.op("Gather", x, g.cast(index, torch.int64), axis=x.axis(dim))


@emits(aten.index_select.default)
def index_select(g: Builder, x: Value, dim: int, index: Value) -> str:
    indices: Operand = index if index.rank else g.axes("Unsqueeze", index, [0])
    return g.op("Gather", x, indices, axis=x.axis(dim))


@emits(aten.index.Tensor)
def index(g: Builder, x: Value, indices: Sequence[Value | None]) -> str:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.int64, torch.int32):
        refuse(f"with {len(given)} index tensors or a mask; one tensor of integers is known")
    return g.op("Gather", x, given[0][1], axis=given[0][0])


@emits(aten.gather.default)
def gather(g: Builder, x: Value, dim: int, index: Value, **_: Any) -> str:
    return g.op("GatherElements", x, index, axis=x.axis(dim))


@emits(aten.triu.default)
def triu(g: Builder, x: Value, diagonal: int = 0) -> str:
    return _triangle(g, x, diagonal, upper=1)


@emits(aten.tril.default)
def tril(g: Builder, x: Value, diagonal: int = 0) -> str:
    return _triangle(g, x, diagonal, upper=0)


def _triangle(g: Builder, x: Value, diagonal: int, upper: int) -> str:
    if g.opset < 14:
        refuse(f"opset {g.opset} has no Trilu; 14 has")
    return g.op("Trilu", x, g.const(diagonal, torch.int64, "diagonal"), upper=upper)


@emits(aten.unbind.int)
def unbind(g: Builder, x: Value, dim: int = 0) -> list[str | None]:
    axis, used = x.axis(dim), g.used
    return [g.op("Gather", x, g.const(i, torch.int64, "index"), axis=axis) if i in used else None for i in range(x.size(axis))]


@emits(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(g: Builder, x: Value, sizes: Sequence[Size], dim: int = 0) -> list[str | None]:
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        refuse("its sizes depend on the batch")
    return [*g.ops("Split", x, g.ints(known, "sizes"), outputs=len(known), axis=x.axis(dim))]


@emits(aten.split.Tensor)
def split(g: Builder, x: Value, size: Size, dim: int = 0) -> list[str | None]:
    if isinstance(size, Symbol):
        return refuse("its size depends on the batch")
    total = x.size(dim)
    return split_with_sizes(g, x, [min(size, total - begin) for begin in range(0, total, size)], dim)


@emits(aten.chunk.default)
def chunk(g: Builder, x: Value, chunks: int, dim: int = 0) -> list[str | None]:
    return split(g, x, -(-x.size(dim) // chunks), dim)


@emits(aten.cat.default)
def cat(g: Builder, tensors: Sequence[Value], dim: int = 0) -> str:
    parts = [part for part in tensors if part.shape != (0,)]  # torch lets empty vectors stand among others
    return g.op("Concat", *(g.cast(part, g.dtype) for part in parts), axis=parts[0].axis(dim))


@emits(aten.stack.default)
def stack(g: Builder, tensors: Sequence[Value], dim: int = 0) -> str:
    axis = dim % (tensors[0].rank + 1)
    return g.op("Concat", *(g.axes("Unsqueeze", g.cast(part, g.dtype), [axis]) for part in tensors), axis=axis)


@emits(aten.flip.default)
def flip(g: Builder, x: Value, dims: Sequence[int]) -> str:
    axes, count = [x.axis(dim) for dim in dims], len(dims)
    bounds = g.ints([-1] * count, "starts"), g.ints([-END] * count, "ends")
    return g.op("Slice", x, *bounds, g.ints(axes, "axes"), g.ints([-1] * count, "steps"))


@emits(aten.roll.default)
def roll(g: Builder, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> str:
    if len(dims) != len(shifts):
        refuse("without a dimension for each shift")
    result = x.name
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.size(dim)
        if cut:
            parts = _slice(g, result, x.axis(dim), cut, END), _slice(g, result, x.axis(dim), 0, cut)
            result = g.op("Concat", *parts, axis=x.axis(dim))
    return result


@emits(aten.pad.default)
def pad(g: Builder, x: Value, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
    """torch lists the last dimension first, (before, after) for each; ONNX all befores, then all afters."""
    if mode not in PAD_MODES or (mode == "circular" and g.opset < 19):
        refuse(f"padding mode {mode!r} at opset {g.opset}")
    if any(isinstance(size, Symbol) for size in pads):
        refuse("its sizes depend on the batch")
    begin, end = [0] * x.rank, [0] * x.rank
    for i in range(len(pads) // 2):
        begin[-1 - i], end[-1 - i] = pads[2 * i], pads[2 * i + 1]
    fill = g.const(value or 0, x.dtype, "value") if mode == "constant" else None
    return g.op("Pad", x, g.ints([*begin, *end], "pads"), fill, mode=PAD_MODES[mode])


@emits(aten.constant_pad_nd.default)
def constant_pad(g: Builder, x: Value, pads: Sequence[int], value: float = 0) -> str:
    return pad(g, x, pads, "constant", value)


@emits(aten.reflection_pad1d.default, aten.reflection_pad2d.default)
def reflection_pad(g: Builder, x: Value, pads: Sequence[int]) -> str:
    return pad(g, x, pads, "reflect")


@emits(aten.replication_pad1d.default, aten.replication_pad2d.default)
def replication_pad(g: Builder, x: Value, pads: Sequence[int]) -> str:
    return pad(g, x, pads, "replicate")


@emits(aten.full.default)
def full(g: Builder, sizes: Sequence[Size], value: Any, **_: Any) -> str:
    return g.op("Expand", g.cast(value, g.dtype), g.dims(sizes))


@emits(aten.zeros.default)
def zeros(g: Builder, sizes: Sequence[Size], **_: Any) -> str:
    return full(g, sizes, 0)


@emits(aten.ones.default)
def ones(g: Builder, sizes: Sequence[Size], **_: Any) -> str:
    return full(g, sizes, 1)


@emits(aten.new_full.default)
def new_full(g: Builder, _x: Value, sizes: Sequence[Size], value: Any, **_: Any) -> str:
    return full(g, sizes, value)


@emits(aten.new_zeros.default)
def new_zeros(g: Builder, _x: Value, sizes: Sequence[Size], **_: Any) -> str:
    return full(g, sizes, 0)


@emits(aten.new_ones.default)
def new_ones(g: Builder, _x: Value, sizes: Sequence[Size], **_: Any) -> str:
    return full(g, sizes, 1)


@emits(aten.full_like.default)
def full_like(g: Builder, x: Value, value: Any, **_: Any) -> str:
    return g.op("Expand", g.cast(value, g.dtype), g.op("Shape", x))


@emits(aten.zeros_like.default)
def zeros_like(g: Builder, x: Value, **_: Any) -> str:
    return full_like(g, x, 0)


@emits(aten.ones_like.default)
def ones_like(g: Builder, x: Value, **_: Any) -> str:
    return full_like(g, x, 1)


@emits(aten.scalar_tensor.default)
def scalar_tensor(g: Builder, value: Any, **_: Any) -> str:
    return g.cast(value, g.dtype)
