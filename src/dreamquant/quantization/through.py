"""Ranges seen through the activation function that follows.

An integer runtime computes a convolution and its LeakyReLU (or SiLU, ...) as two operations, so the tensor between them is
quantized too. What matters of it is what the function lets through: LeakyReLU shrinks negative values to a tenth, so steps
spent on them are wasted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from dreamquant.network.graph import aten
from dreamquant.network.interpreter import call
from dreamquant.network.operators import is_call
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.histogram import Values, summarize
from dreamquant.quantization.sites import UNMERGED

LOWS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
HIGHS = (1.0, 0.95, 0.9, 0.8, 0.7)


def following_function(deciders: tuple[fx.Node, ...]) -> Callable[[Tensor], Tensor] | None:
    """The element-wise function that is all a tensor is used for, f(x) or x f(x); None where there is no such.

    Nor has a grid of several deciders one: only some of its tensors may lead into the function. A node is read through its
    quantizer, as in a student's graph.
    """
    if len(deciders) > 1:
        return None
    (node,) = deciders
    readers = [user for user in node.users if user.op == "call_module"]
    node = readers[0] if readers else node
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], UNMERGED) and len(users[0].all_input_nodes) == 1:
        return _call(users[0])
    functions = [user for user in users if is_call(user, UNMERGED) and len(user.all_input_nodes) == 1]
    products = [user for user in users if is_call(user, {aten.mul.Tensor}) and node in user.all_input_nodes]
    if len(functions) == len(products) == 1 and len(users) == 2 and functions[0] in products[0].all_input_nodes:
        inner = _call(functions[0])
        return lambda x: x * inner(x)
    return None


def _call(node: fx.Node) -> Callable[[Tensor], Tensor]:
    return lambda x: call(node, dict.fromkeys(node.all_input_nodes, x))


def narrow(
    values: Tensor | Values,
    low: Tensor,
    high: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    bits: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The part of [low, high] whose grid leaves the least squared error behind `function`; values are of one group, low and
    high (1,)."""
    points, weights = summarize(values)
    exact = function(points)
    best, chosen = torch.inf, (low, high)
    for low_ratio in LOWS:
        for high_ratio in HIGHS:
            grid = grid_of_range(low * low_ratio, high * high_ratio, bits=bits, symmetric=symmetric)
            error = ((function(grid.fake(points)) - exact).square() * weights).sum().item()
            if error < best:
                best, chosen = error, (low * low_ratio, high * high_ratio)
    return chosen
