"""What kinds of operations there are, for the stages that treat them differently."""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

from torch import fx

from dreamquant.network.graph import aten, is_input
from dreamquant.network.notes import is_tensor

# a weight times an activation: input at args[0], weight at args[1], bias at args[2], groups at args[6]
TRANSPOSED: set[Any] = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
CONVOLUTIONS: set[Any] = {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default} | TRANSPOSED
LINEARS = {aten.linear.default}
WEIGHTED = CONVOLUTIONS | LINEARS

SOFTMAX: set[Any] = {aten.softmax.int, aten._softmax.default}

# an activation times an activation
PRODUCTS = {aten.matmul.default, aten.bmm.default}

# activations that an integer runtime merges into the layer before them: they only cut the range off
CLIPPING = {aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}

# other element-wise operations and poolings with an integer form
INTEGER_CAPABLE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.cat.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.leaky_relu.default,
    aten.sigmoid.default,
}

# operations whose output holds only values of their input (and zeros): it stays on the input's grid
PASSTHROUGH = {
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
    aten.expand.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.upsample_nearest2d.vec,
    aten.pixel_shuffle.default,
}

# those of them that may drop values
PARTIAL: set[Any] = {
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
}


def is_call(node: object, targets: Set[Any]) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def output_channel_axis(node: fx.Node) -> int:
    """The axis of a weighted node's weight that runs over output channels."""
    return 1 if node.target in TRANSPOSED else 0


def argument(call: fx.Node, place: int) -> fx.Node:
    """An argument of a call that is a node, as a layer's input (place 0) or weight (1)."""
    found = call.args[place]
    assert isinstance(found, fx.Node)
    return found


def bias_node(layer: fx.Node) -> fx.Node | None:
    """The node that gives the bias of a layer with weights; None for a layer without one."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def unquantized(node: fx.Node) -> fx.Node:
    """A node, or that which it quantizes."""
    return node.all_input_nodes[0] if node.op == "call_module" else node


def data_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The tensor-valued nodes that depend on the images, in order, the images first."""
    found: list[fx.Node] = []
    depends: set[fx.Node] = set()  # also those of several tensors, as of a split
    for node in graph.nodes:
        if is_input(node) or (node.op != "output" and any(one in depends for one in node.all_input_nodes)):
            if is_tensor(node):
                found.append(node)
            elif not _is_tuple(node):
                continue  # a size
            depends.add(node)
    return found


def data_users(node: fx.Node) -> list[fx.Node]:
    """The users of a tensor; for one that gives several tensors, as a split does, those that are taken from it."""
    return [one for user in node.users for one in (user.users if _is_tuple(user) else [user])]


def _is_tuple(node: fx.Node) -> bool:
    return not is_tensor(node) and bool(node.users) and all(user.target is operator.getitem for user in node.users)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are computed, not stored: everything but `get_attr` and integers."""
    return [argument for argument in node.all_input_nodes if argument.op != "get_attr" and is_tensor(argument)]
