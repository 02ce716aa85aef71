"""Pairs of layers between which a channel can be given another scale or offset without anybody else noticing."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from dreamquant.network.graph import aten
from dreamquant.network.notes import is_tensor, shape_of
from dreamquant.network.operators import CONVOLUTIONS, LINEARS, TRANSPOSED, WEIGHTED, data_inputs, is_call, output_channel_axis

# operations that compute each channel of (N, C, H, W) from that channel alone, so that a scale of it passes through
CHANNEL_WISE = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.upsample_nearest2d.vec,
}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
FLATTENING = {aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims}


@dataclass(frozen=True)
class Pair:
    """Layer `second` is all that reads the channels of layer `first`, through the nodes `between`, in order.

    `function` is the one of them that is an activation function, if any. Channel i of `first` is `positions` input channels of
    `second`, from i * positions on: more than one where it was flattened.
    """

    first: fx.Node
    between: tuple[fx.Node, ...]
    second: fx.Node
    function: fx.Node | None
    positions: int


def pairs(graph: fx.Graph, functions: Set[Any]) -> list[Pair]:
    """The pairs of a graph, in order, with at most one activation function of `functions` between the two layers.

    Weights and biases belong to their layer alone. Grouped transposed convolutions are in no pair: they order their channels
    differently.
    """
    return [pair for node in graph.nodes if _own_weights(node) and (pair := _pair(node, functions)) is not None]


def _own_weights(node: fx.Node) -> bool:
    if not is_call(node, WEIGHTED) or (node.target in TRANSPOSED and groups_of(node) != 1):
        return False
    stored = [argument for argument in node.args[1:3] if isinstance(argument, fx.Node)]
    return all(argument.op == "get_attr" and len(argument.users) == 1 for argument in stored)


def _pair(first: fx.Node, functions: Set[Any]) -> Pair | None:
    between: list[fx.Node] = []
    function: fx.Node | None = None
    node = first
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_call(user, WEIGHTED):
            return _closed(first, between, user, function) if _own_weights(user) and user.args[0] is node else None
        if is_call(user, functions) and function is None and data_inputs(user) == [node]:
            function = user
        elif not _keeps_channels(user):
            return None
        between.append(user)
        node = user
    return None


def _closed(first: fx.Node, between: list[fx.Node], second: fx.Node, function: fx.Node | None) -> Pair | None:
    """The pair, if both layers mean the same by a channel."""
    channels, entering = _channels(first), between[-1] if between else first
    rank, last = len(shape_of(entering)), len(shape_of(first))
    if is_call(first, LINEARS) and last > 2:  # channels lie along the last axis, which other operations do not know
        aligned = is_call(second, LINEARS) and all(node is function for node in between)
    else:
        aligned = rank == 2 if is_call(second, LINEARS) else rank > 2
    width = shape_of(entering)[-1 if is_call(second, LINEARS) else 1]
    if not aligned or width % channels:
        return None
    return Pair(first, tuple(between), second, function, width // channels)


def _keeps_channels(node: fx.Node) -> bool:
    """Whether channel i of the output is made of channel i of the input, and zeros; flattened, of the i-th run of positions."""
    source = data_inputs(node)[0] if len(data_inputs(node)) == 1 and is_tensor(node) else None
    if source is None:
        return False
    before, after = shape_of(source), shape_of(node)
    if is_call(node, FLATTENING):
        return bool(after[0] == before[0] and (after[:2] == before[:2] or len(after) == 2))
    if is_call(node, PADS):
        padding, constant = node.args[1], node.target is aten.constant_pad_nd.default or node.args[2:3] in ((), ("constant",))
        value = node.args[-1] if isinstance(node.args[-1], int | float) else 0
        return len(before) > 2 and len(padding) <= 2 * (len(before) - 2) and constant and value == 0  # type: ignore[arg-type]
    if is_call(node, {aten.mean.dim}):
        axes: Any = node.args[1]
        return len(before) > 2 and bool(axes) and all(axis % len(before) > 1 for axis in axes)
    return is_call(node, CHANNEL_WISE)


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a layer or pooling computes its border from zeros that are not its input's."""
    if is_call(node, PADS):
        return True
    place = 4 if is_call(node, CONVOLUTIONS) else 3 if is_call(node, {aten.avg_pool2d.default}) else None
    if place is None or len(node.args) <= place:
        return False
    padding: Any = node.args[place]
    if is_call(node, {aten.avg_pool2d.default}) and len(node.args) > 5 and not node.args[5]:
        return False  # the zeros are not counted
    if isinstance(padding, str):
        weight: Any = node.args[1]
        return padding == "same" and any(size > 1 for size in shape_of(weight)[2:])
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def groups_of(layer: fx.Node) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    place = 6 if is_call(layer, CONVOLUTIONS) else len(layer.args)
    groups: Any = layer.args[place] if len(layer.args) > place else 1
    return int(groups)


def _channels(layer: fx.Node) -> int:
    return shape_of(layer)[-1 if is_call(layer, LINEARS) else 1]


def output_rows(layer: fx.Node, weight: Tensor) -> Tensor:
    """A layer's weight as (output channels, n)."""
    return weight.transpose(0, output_channel_axis(layer)).flatten(1)


def input_rows(layer: fx.Node, weight: Tensor, positions: int = 1) -> Tensor:
    """A layer's weight as (channels that it reads, n)."""
    if layer.target in TRANSPOSED:
        return weight.flatten(1)
    groups = groups_of(layer)
    grouped = weight.reshape(groups, len(weight) // groups, weight.shape[1] // positions, -1).transpose(1, 2)
    return grouped.reshape(groups * (weight.shape[1] // positions), -1)


def along_outputs(layer: fx.Node, weight: Tensor, values: Tensor) -> Tensor:
    """One value an output channel, shaped to multiply the weight."""
    shape = [1] * weight.dim()
    shape[output_channel_axis(layer)] = -1
    return values.view(shape)


def along_inputs(layer: fx.Node, weight: Tensor, values: Tensor, positions: int = 1) -> Tensor:
    """One value a channel that is read, shaped to multiply the weight."""
    ones = (1,) * (weight.dim() - 2)
    if layer.target in TRANSPOSED:
        return values.view(-1, 1, *ones)
    groups = groups_of(layer)
    each = values.repeat_interleave(positions).view(groups, 1, -1)
    return each.expand(groups, len(weight) // groups, -1).reshape(len(weight), -1, *ones)
