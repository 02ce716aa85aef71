"""What is known of a graph's nodes: one typed record a node.

fx hands `node.meta` on when a graph is copied, and not what is in it: the record is frozen, and replaced as a whole. What the
passes of torch leave there is read at capture, and then dropped. No other module touches `node.meta`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

Kind = Literal["activation", "weight", "bias", "constant"]

_KEY = "dreamquant"


@dataclass(frozen=True)
class Notes:
    """What is known of one node."""

    shape: tuple[int, ...] | None = None
    """Of the node's tensor on the recorded batch, None where it gives none; from `note_value`, read by `shape_of`."""
    dtype: torch.dtype | None = None
    """Of the same tensor; from `note_value`, read by `bytes_of`."""
    origin: str | None = None
    """The value of the file or module that the node stands for; from importer, capture and emitter, read by exporters."""
    transposed: bool = False
    """A `get_attr` holds the transpose of the file's tensor; from importer and emitter, read where constants are written."""
    normal: tuple[Tensor, Tensor] | None = None
    """Mean and deviation of a layer's output channels, from the BatchNorm that was folded into it; read as statistics."""
    absorbed: tuple[str, ...] = ()
    """The values of the file between a layer and the last BatchNorm that was folded into it; read where files are rewritten."""
    inner: bool = False
    """A step inside one node of the file, which has no name for it; from the importer, read where sites are chosen."""
    changed: bool = False
    """A `get_attr` no longer holds the file's tensor; from `set_tensor`, read where constants are written."""
    gained: str | None = None
    """A `get_attr` is the bias of this layer, which had none; from `set_bias`, read where constants are written."""
    kept: str | None = None
    """The buffer of what the float network has in a `get_attr`; from `keep_float`, read by `float_tensor`."""
    kind: Kind | None = None
    """What a `call_module` quantizes; from `prepare`, which puts quantizers in, read by all that looks for them."""


NOTHING = Notes()


def notes(node: fx.Node) -> Notes:
    """What is known of a node."""
    found = node.meta.get(_KEY, NOTHING)
    assert isinstance(found, Notes)
    return found


def set_notes(node: fx.Node, found: Notes) -> None:
    """Replace what is known of a node, and drop what others have left there."""
    node.meta = {_KEY: found}


def exported_value(node: Argument) -> Any:
    """The example value that `torch.export` has left at a node, None where there is none."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def note_value(node: fx.Node, value: Any) -> Any:
    """Note shape and number type of what a node gives, and return it; sizes, and several tensors, have none."""
    if isinstance(value, Tensor):
        set_notes(node, replace(notes(node), shape=tuple(value.shape), dtype=value.dtype))
    return value


def is_tensor(node: fx.Node) -> bool:
    """Whether a node gives one tensor: no size, no tuple."""
    return notes(node).shape is not None


def shape_of(node: Argument) -> tuple[int, ...]:
    """The shape of a node's tensor, given as a node or as the argument of one, on the recorded batch."""
    assert isinstance(node, fx.Node)
    shape = notes(node).shape
    assert shape is not None
    return shape


def bytes_of(node: fx.Node) -> int:
    """How much memory a node's tensor takes on the recorded batch."""
    dtype = notes(node).dtype
    assert dtype is not None
    return math.prod(shape_of(node)) * dtype.itemsize
