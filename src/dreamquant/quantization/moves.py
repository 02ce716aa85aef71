"""Operations that compute nothing: what they give holds the values that they read."""

from __future__ import annotations

from torch import fx

from dreamquant.network.graph import aten
from dreamquant.network.operators import PASSTHROUGH, data_inputs, is_call
from dreamquant.network.padding import PADS, pads_with_zeros


def is_passthrough(node: fx.Node) -> bool:
    """Whether the node's output holds only values of its one computed input, and zeros."""
    if not is_call(node, PASSTHROUGH) or len(data_inputs(node)) != 1:
        return False
    if node.target is aten.pad.default and len(node.args) > 2 and node.args[2] != "constant":
        return True
    return node.target not in PADS or pads_with_zeros(node)


def moves(node: fx.Node) -> bool:
    """Whether an operation computes nothing: it rearranges a tensor, or joins several."""
    return is_passthrough(node) or is_call(node, {aten.cat.default})


def unmoved(node: fx.Node) -> fx.Node:
    """What a tensor is a mere rearrangement of."""
    while is_passthrough(node):
        node = data_inputs(node)[0]
    return node
