"""Linear layers whose bias the file adds by an operator of its own: where every tensor has a grid, so has the product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx
from torch import fx

from dreamquant.network.graph import Network, aten
from dreamquant.network.notes import Notes, notes, set_notes, shape_of
from dreamquant.network.operators import LINEARS, bias_node, data_nodes, is_call


def separate_biases(network: Network) -> None:
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
    network.graph.recompile()


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
