"""Results of operators that a plan gives a grid of their own, whatever they are: 1/256 and -128 for a sigmoid, ..."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dreamquant.network.graph import aten
from dreamquant.network.operators import SOFTMAX, data_inputs, is_call, unquantized
from dreamquant.quantization.forms import activation_form
from dreamquant.quantization.grid import Grid, integer_limits
from dreamquant.quantization.moves import moves
from dreamquant.quantization.plan import Fixed, FixedOperator, Plan

FIXED_OPERATORS: dict[FixedOperator, set[Any]] = {
    "sigmoid": {aten.sigmoid.default},
    "hard_sigmoid": {aten.hardsigmoid.default},
    "softmax": SOFTMAX,
    "log_softmax": {aten.log_softmax.int, aten._log_softmax.default},
    "tanh": {aten.tanh.default},
}


def fixed_form(node: fx.Node, plan: Plan, bits: int) -> Fixed | None:
    """What the plan fixes for the results of a node, if it does."""
    return next((one for one in plan.fixed if one.bits == bits and is_call(node, FIXED_OPERATORS[one.operator])), None)


def shared_form(deciders: tuple[fx.Node, ...], plan: Plan, bits: int) -> Fixed | None:
    """What the plan fixes for all tensors that decide a grid, or that these are joined or rearranged from; None where it fixes
    nothing for one of them, or another grid."""
    found = [fixed_form(node, plan, bits) for node in _made_of(deciders)] if plan.fixed else []
    same = {None if one is None else (one.steps, one.zero_point) for one in found}
    return found[0] if len(same) == 1 else None


def fixed_grid(deciders: tuple[fx.Node, ...], plan: Plan, bits: int, device: torch.device) -> Grid | None:
    """The grid that `shared_form` says."""
    found = shared_form(deciders, plan, bits)
    if found is None:
        return None
    scale = torch.tensor([1 / found.steps], dtype=torch.float32, device=device)
    limits = integer_limits(bits, signed=activation_form(plan, bits).signed)
    return Grid(scale, torch.full_like(scale, float(found.zero_point)), *limits)


def _made_of(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The nodes that compute the values of these, not those that move them."""
    found, waiting = dict[fx.Node, None](), [unquantized(node) for node in nodes]
    while waiting:
        node = waiting.pop()
        if moves(node):
            waiting += [unquantized(source) for source in data_inputs(node)]
        else:
            found[node] = None
    return list(found)
