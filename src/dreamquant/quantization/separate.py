"""Operations that a file has in several operators: where every tensor has a grid, so have those in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
from torch import fx

from dreamquant.network.graph import Network, aten
from dreamquant.network.notes import Notes, notes, set_notes, shape_of
from dreamquant.network.operators import LINEARS, argument, bias_node, data_nodes, is_call


def separate(network: Network) -> None:
    """Take such operations apart, in place: biases that are added to products, x sigmoid(x), means over pixels."""
    _separate_biases(network)
    if network.source.proto is None:  # else the file has told
        for node in data_nodes(network.graph.graph):
            if is_call(node, {aten.silu.default}):
                gate = _before(node, aten.sigmoid.default, (argument(node, 0),), shape_of(node))
                node.target, node.args = aten.mul.Tensor, (argument(node, 0), gate)
            elif is_call(node, {aten.mean.dim}) and _drops_pixels(node):
                axes, shape = list(range(2, len(shape_of(argument(node, 0))))), shape_of(node)
                pooled = _before(node, aten.mean.dim, (argument(node, 0), axes, True), (*shape, *(1 for _ in axes)))
                node.target, node.args, node.kwargs = aten.squeeze.dims, (pooled, axes), {}
    network.graph.recompile()


def _before(node: fx.Node, target: Any, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
    """A new node that computes what another is to read."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, arguments, name=f"{node.name}_inner")
    set_notes(made, Notes(shape, notes(node).dtype))
    return made


def _drops_pixels(node: fx.Node) -> bool:
    """Whether a mean is over all pixels of images (N, C, ...), and drops their axes."""
    rank, axes = len(shape_of(argument(node, 0))), node.args[1] if len(node.args) > 1 else None
    pixels = isinstance(axes, Sequence) and sorted(axis % rank for axis in axes if isinstance(axis, int)) == list(range(2, rank))
    return rank > 2 and pixels and len(shape_of(node)) == 2


def _separate_biases(network: Network) -> None:
    """Make a linear layer and its bias a product and a sum, in place, where the file has them so or will."""
    graph, proto = network.graph.graph, network.source.proto
    makers = None if proto is None else {name: node for node in proto.graph.node for name in node.output}
    for layer in [node for node in data_nodes(graph) if is_call(node, LINEARS)]:
        bias, known = bias_node(layer), notes(layer)
        product = None if bias is None else _product(layer, notes(bias), makers)
        if bias is None or product is None:
            continue
        users = list(layer.users)
        with graph.inserting_after(layer):
            total = graph.call_function(aten.add.Tensor, (layer, bias), name=f"{layer.name}_sum")
        for user in users:
            user.replace_input_with(layer, total)
        layer.args = (*layer.args[:2], None, *layer.args[3:])
        set_notes(total, replace(known, normal=None, absorbed=()))
        set_notes(layer, replace(product, normal=None))
        if notes(bias).gained is not None:
            set_notes(bias, replace(notes(bias), gained=total.name))


def _product(layer: fx.Node, bias: Notes, makers: Mapping[str, onnx.NodeProto] | None) -> Notes | None:
    """What is known of a layer's product by itself; None where the file has no such tensor, and will have none."""
    known = notes(layer)
    if makers is None:
        return known if len(shape_of(layer)) != 2 else None  # else it will be a Gemm
    if bias.gained is not None:  # the file has the product alone, or another sum that is folded
        first = makers[known.absorbed[0] if known.absorbed else known.origin or ""]
        return known if first.op_type == "MatMul" else None
    add = makers[known.origin or ""]
    products = [name for name in add.input if name in makers and makers[name].op_type == "MatMul"]
    return replace(known, origin=products[0]) if add.op_type == "Add" and len(products) == 1 else None
