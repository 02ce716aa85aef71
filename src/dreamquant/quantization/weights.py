"""Weights: the grid or the codebook of every layer's, and scales that no 16-bit sum overflows under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError
from dreamquant.methods import find_method
from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import notes, shape_of
from dreamquant.network.operators import CONVOLUTIONS, is_call, output_channel_axis
from dreamquant.network.pairs import groups_of
from dreamquant.quantization.channel_bits import channel_bits, grid_of_channels
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.forms import activation_form, weight_axis, weight_form
from dreamquant.quantization.plan import LARGEST_BITS
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.walk import keep_float, quantizer_of

LARGEST_SUM = 128  # of two weights of one sign that are multiplied by activations up to 255 and summed in 16 bits


def weight_grids(student: Student, widths: dict[str, int]) -> None:
    """Give every weight, and every constant that meets activations, its levels, as many as `widths` says by its quantizer's name.

    Raises `OptionError` for unknown options.
    """
    plan, graph = student.plan, student.network.graph
    method = find_method("ranges", plan.weight_ranges)
    options = method.check_options(plan.weight_options)
    codebook = None if plan.weight_levels == "uniform" else find_method("codebooks", plan.weight_levels)
    level_options = {} if codebook is None else codebook.check_options(plan.level_options)
    for node in quantizer_nodes(graph.graph):
        if notes(node).kind == "constant":
            values = tensor_of(graph, node.all_input_nodes[0])
            form = activation_form(plan, widths[str(node.target)])
            quantizer_of(graph, node).grid = form.grid(*values.aminmax(), values.reshape(1, -1))
        if notes(node).kind != "weight":
            continue
        weight = tensor_of(graph, node.all_input_nodes[0])
        layer = next(iter(node.users))
        axis = weight_axis(layer, plan)
        rows = weight.reshape(1, 1, -1) if axis is None else weight.transpose(0, axis).flatten(1).unsqueeze(1)
        bits = widths[str(node.target)]
        if codebook is not None:
            levels = codebook.function(rows.squeeze(1), bits=bits, **level_options)
            quantizer_of(graph, node).grid = Codebook(levels, axis)
            continue
        if plan.channel_bits and axis is not None:
            _give_channels_bits(student, node, layer, bits, partial(method.function, **options))
            continue
        low, high = method.function(rows, bits=bits, symmetric=plan.weight_symmetric, **options)
        grid = weight_form(plan, bits).grid(low, high, rows, axis=axis)
        if plan.saturation_free and grid.qmin < 0 and bits <= LARGEST_BITS and not is_depthwise(layer):
            grid = replace(grid, scale=torch.maximum(grid.scale, saturation_free_scale(weight, axis)))
        quantizer_of(graph, node).grid = grid


def _give_channels_bits(student: Student, node: fx.Node, layer: fx.Node, bits: int, find: Callable[..., Any]) -> None:
    """Put the weight that `node` quantizes on a grid whose channels have bits of their own, `bits` on average."""
    graph, stored, axis = student.network.graph, node.all_input_nodes[0], output_channel_axis(layer)
    if student.plan.weight_symmetric:
        raise OptionError(
            "channel_bits gives channels as few as 2 levels, which no symmetric grid has: set weight_symmetric=false"
        )
    turned = tensor_of(graph, stored).transpose(0, axis)
    rows = turned.flatten(1)
    grid, values = grid_of_channels(rows, channel_bits(rows, bits), find, axis)
    keep_float(graph, stored)
    set_tensor(graph, stored, values.view(turned.shape).transpose(0, axis).contiguous())
    quantizer_of(graph, node).grid = grid


def saturation_free_scale(weight: Tensor, axis: int | None) -> Tensor:
    """The smallest scales (1,) or (channels,) under which no two neighbouring weights overflow a 16-bit sum.

    x86 processors without VNNI multiply unsigned activations by signed weights in pairs and add each pair in saturating 16 bits:
    255 (w1 + w2) must stay within 32767, so two weights of one sign may add up to `LARGEST_SUM`. Neighbours are those along the
    order in which a runtime lines up a convolution's inputs: channels first, channels last, or channels of one position.
    """
    scale = largest_pairs(weight, axis) / (LARGEST_SUM - 1)  # both weights may be rounded up
    return scale.max().reshape(1) if axis is None else scale


def largest_pairs(weight: Tensor, axis: int | None) -> Tensor:
    """The largest sum of two such neighbours in each channel of `axis`, or of the first."""
    rows = weight if axis in (None, 0) else weight.transpose(0, axis)
    orders = [rows.flatten(1)]
    if rows.dim() > 2:
        last = rows.movedim(1, -1)
        orders += [last.flatten(1), last.flatten(1, -2)]
    return torch.stack([_largest_pair(order) for order in orders]).amax(0)


def _largest_pair(rows: Tensor) -> Tensor:
    """The largest sum of neighbours (0, 1), (2, 3), ... of one sign, along the last axis, in each of (rows, ...)."""
    if rows.shape[-1] % 2:
        rows = torch.cat([rows, torch.zeros_like(rows[..., :1])], -1)
    pairs = rows.reshape(*rows.shape[:-1], -1, 2)
    sums = torch.maximum(pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1))
    return sums.flatten(1).amax(1)


def is_depthwise(layer: fx.Node) -> bool:
    """Whether each output channel of a convolution reads one input channel; runtimes add those in 32 bits."""
    return is_call(layer, CONVOLUTIONS) and groups_of(layer) != 1 and shape_of(layer.args[1])[1] == 1
