"""A product with a stored matrix is a layer, however it was written; and a layer's bias is stored, or is a sum behind it."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from dreamquant.network.edit import add_tensor
from dreamquant.network.graph import aten, tensor_of
from dreamquant.network.notes import Notes, notes, shape_of
from dreamquant.network.operators import LINEARS, PRODUCTS, WEIGHTED, is_call

MATRIX_PRODUCTS: set[Any] = PRODUCTS | {aten.mm.default}
SUMS: set[Any] = {aten.addmm.default}


def name_layers(graph: fx.GraphModule) -> None:
    """Write products with stored matrices as `linear`, and biases that are computed as sums behind their layers, in place.

    Shapes must be recorded, and nodes that are new here get none; what does not depend on the images must
    be stored.
    """
    weights: dict[tuple[fx.Node, bool], fx.Node] = {}
    for node in list(graph.graph.nodes):
        if is_call(node, MATRIX_PRODUCTS) and _is_matrix(node.args[1], node.args[0]):
            _become_linear(node, node.args[0], _weight(graph, node.args[1], weights, turned=True))
        elif is_call(node, MATRIX_PRODUCTS) and _is_matrix(*node.args):
            _become_linear_of_columns(node, node.args[1], _weight(graph, node.args[0], weights, turned=False))
        elif is_call(node, SUMS) and not node.kwargs and _is_matrix(*reversed(node.args[1:])):
            _become_linear(node, node.args[1], _weight(graph, node.args[2], weights, turned=True), node.args[0])
        if is_call(node, WEIGHTED) and len(node.args) > 2 and _is_no_bias(node.args[2]):
            _add_behind(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_matrix(node: Any, factor: Any) -> bool:
    """Whether a node is one stored matrix for all the vectors of the other factor."""
    if node.op != "get_attr" or factor.op == "get_attr":
        return False
    shape, rank = shape_of(node), len(shape_of(factor))
    return 2 <= len(shape) <= rank and math.prod(shape[:-2]) == 1


def _is_no_bias(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.op != "get_attr" or len(shape_of(node)) != 1)


def _weight(graph: fx.GraphModule, matrix: Any, weights: dict[tuple[fx.Node, bool], fx.Node], *, turned: bool) -> fx.Node:
    """The stored matrix (out, in) of a linear layer, stored once for all layers that it is in."""
    if (matrix, turned) not in weights:
        value = tensor_of(graph, matrix).reshape(shape_of(matrix)[-2:])
        name = notes(matrix).origin or str(matrix.target)
        weights[matrix, turned] = add_tensor(graph, name, value.t() if turned else value, Notes(origin=name), before=matrix)
    return weights[matrix, turned]


def _become_linear(node: fx.Node, *arguments: Any) -> None:
    node.target, node.args = aten.linear.default, arguments
    node._rename("linear")


def _become_linear_of_columns(node: fx.Node, x: Any, weight: fx.Node) -> None:
    """C x = (x^T C^T)^T"""
    with node.graph.inserting_before(node):
        rows = node.graph.call_function(aten.transpose.int, (x, -2, -1))
        linear = node.graph.call_function(aten.linear.default, (rows, weight))
    node.target, node.args = aten.transpose.int, (linear, -2, -1)
    node._rename("transpose")


def _add_behind(node: fx.Node) -> None:
    """Take the bias out of a layer and add it to what the layer gives."""
    bias = node.args[2]
    with node.graph.inserting_after(node):
        total = node.graph.call_function(aten.add.Tensor, (node, bias))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    node.update_arg(2, None)
    if not is_call(node, LINEARS):
        with node.graph.inserting_before(node):
            ones = [1] * (len(shape_of(node)) - 2)
            column = node.graph.call_function(aten.reshape.default, (bias, [-1, *ones]))
        total.update_arg(1, column)
