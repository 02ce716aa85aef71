"""Zeros around a tensor that whoever reads it can put there itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from dreamquant.network.graph import aten
from dreamquant.network.operators import is_call

PADS: set[Any] = {aten.pad.default, aten.constant_pad_nd.default}
SPATIAL: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3, aten.avg_pool2d.default: 2}


class Padding(NamedTuple):
    """How many zeros stand before and after a tensor along each of its spatial axes."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a node puts zeros around a tensor."""
    if not is_call(node, PADS):
        return False
    if node.target is aten.constant_pad_nd.default:
        return not any(node.args[2:])
    return node.args[2:3] in ((), ("constant",)) and not any(node.args[3:])


def merged_padding(node: fx.Node) -> Padding | None:
    """The zeros that a node adds, where all who read it are convolutions or average poolings that can add them as well.

    These pad the spatial axes alone, and an average pooling only where all its zeros count. None for any other node.
    """
    if not pads_with_zeros(node) or not node.users:
        return None
    amounts: Any = node.args[1]
    if not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
        return None
    sizes: list[int] = list(amounts)  # of the last axis first, each before and after
    if not all(_adds(user, node, sizes) for user in node.users):
        return None
    around = 2 * SPATIAL[next(iter(node.users)).target]
    if any(sizes[around:]):
        return None
    sizes = (sizes + [0] * around)[:around]
    return Padding(tuple(sizes[-2::-2]), tuple(sizes[-1::-2]))


def _adds(user: fx.Node, node: fx.Node, sizes: list[int]) -> bool:
    """Whether a reader of a tensor can put zeros of these sizes around it."""
    if not is_call(user, SPATIAL.keys()) or user.args[0] is not node or node in user.args[1:]:
        return False
    if user.target is not aten.avg_pool2d.default:
        return True
    kernel, _, own, rounds_up, counts, divisor = _pooling(*user.args[1:])
    around: int = max(own) if isinstance(own, Sequence) else own
    window: int = min(kernel) if isinstance(kernel, Sequence) else kernel
    fits = max(sizes, default=0) + around < window
    return fits and not rounds_up and divisor is None and bool(counts or not around)


def _pooling(
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> tuple[Any, ...]:
    """The arguments of a pooling behind its input."""
    return kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
