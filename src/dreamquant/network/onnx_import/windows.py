"""Sliding windows: kernel, strides, dilations and the padding of convolutions and pools, however the file gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Op

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """One entry per spatial dimension; `before` and `after` are the padding at the low and the high end."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    @property
    def symmetric(self) -> bool:
        """Whether both ends are padded alike."""
        return self.before == self.after

    @property
    def padding(self) -> list[int]:
        """Both ends' padding in the order of `aten.pad`: the last dimension first."""
        return interleaved(self.before, self.after)


def interleaved(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding per dimension -> the flat list of `aten.pad`, the last dimension first."""
    pairs = list(zip(before, after, strict=True))
    return [amount for pair in reversed(pairs) for amount in pair]


def window(op: Op, kernel: Sequence[int]) -> Window:
    """The window of a convolution or pool with this `kernel`; auto_pad is resolved on the input's shape."""
    rank = len(kernel)
    strides = op.attribute("strides", [1] * rank)
    dilations = op.attribute("dilations", [1] * rank)
    before, after = _pads(op, list(kernel), strides, dilations)
    return Window(list(kernel), strides, dilations, before, after)


def _pads(op: Op, kernel: list[int], strides: list[int], dilations: list[int]) -> tuple[list[int], list[int]]:
    rank = len(kernel)
    mode = op.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = op.attribute("pads", [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        op.refuse(f"attribute auto_pad={mode!r}; known: NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    totals = [
        max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        for size, k, stride, dilation in zip(op.shape(0)[2:], kernel, strides, dilations, strict=True)
    ]
    halves, rests = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (halves, rests) if mode == "SAME_UPPER" else (rests, halves)


def padded(op: Op, node: fx.Node, win: Window, value: float = 0.0) -> tuple[fx.Node, list[int]]:
    """The input and the symmetric padding to leave to the operator; unequal ends are padded explicitly with `value`."""
    if win.symmetric:
        return node, win.before
    return op.call(aten.pad.default, node, win.padding, "constant", value), [0] * len(win.kernel)
