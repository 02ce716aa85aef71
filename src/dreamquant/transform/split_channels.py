"""Outlier channel splitting: the input channels with the largest weights are read twice, with half the weight each time."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError
from dreamquant.network.edit import add_buffer, set_tensor
from dreamquant.network.graph import Network, aten, input_node, tensor_of
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import LINEARS, TRANSPOSED, WEIGHTED, argument, is_call
from dreamquant.network.pairs import groups_of

PAPER = "Zhao et al., Improving Neural Network Quantization without Retraining using Outlier Channel Splitting (ICML 2019)"
ROUNDS = 60  # in which the step and the halves that depend on it agree


def split_channels(network: Network, *, bits: int, ratio: float = 0.02) -> Network:
    """Splits the input channels with the largest weights in two, each of which gets half the weight: the largest |w| falls.

    Quantization-aware splitting: ceil(`ratio` C_in) times, the channel with the largest |w| is split into w/2 - d/4 and
    w/2 + d/4, so that the rounded halves add up to the rounded whole. d is the step of the symmetric grid of `bits` bits over the
    whole weight that comes out. The activation's channel is repeated before the layer. The first layer, layers with groups and
    those that share their weight stay as they are. Raises `OptionError` for a ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise OptionError(f"split_channels.ratio is {ratio}; it must be above 0 and at most 1")
    graph = copy.deepcopy(network.graph)
    layers = [node for node in graph.graph.nodes if is_call(node, WEIGHTED)][1:]
    layers = [layer for layer in layers if _can_split(layer)]
    for layer in layers:
        _split_layer(graph, layer, bits, ratio)
    if not layers:
        return network.with_graph(graph)
    graph.graph.lint()
    graph.recompile()
    record_shapes(graph, torch.zeros(shape_of(input_node(graph.graph)), device=network.device))
    return network.rebuilt(graph)


def _can_split(layer: fx.Node) -> bool:
    weight = layer.args[1]
    return groups_of(layer) == 1 and isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1


def _split_layer(graph: fx.GraphModule, layer: fx.Node, bits: int, ratio: float) -> None:
    axis = 0 if layer.target in TRANSPOSED else 1
    weight = tensor_of(graph, argument(layer, 1))
    rows = weight.transpose(0, axis)
    split, sources = split_rows(rows.flatten(1).double().cpu(), math.ceil(ratio * len(rows)), bits)  # number by number
    split = split.float().to(weight.device)
    set_tensor(graph, argument(layer, 1), split.view(-1, *rows.shape[1:]).transpose(0, axis).contiguous())
    name = add_buffer(graph, f"{layer.name}_channels", sources.to(weight.device))
    with graph.graph.inserting_before(layer):
        place = -1 if is_call(layer, LINEARS) else 1
        arguments = (layer.args[0], place % len(shape_of(argument(layer, 0))), graph.graph.get_attr(name))
        layer.args = (graph.graph.call_function(aten.index_select.default, arguments), *layer.args[1:])


def split_rows(rows: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """Rows (C, n), each the weights of one channel -> (C + count, n), and of which channel each of these is a part."""
    largest, parts, sources = rows.abs().amax(1).tolist(), [], list(range(len(rows)))
    for _ in range(count):
        part = max(range(len(largest)), key=largest.__getitem__)
        largest[part] /= 2
        largest.append(largest[part])
        sources.append(sources[part])
        parts.append(part)
    step = 0.0
    for _ in range(ROUNDS):
        whole = torch.cat([rows, rows.new_zeros(count, rows.shape[1])])
        for place, part in enumerate(parts, start=len(rows)):
            whole[place] = whole[part] / 2 + step / 4
            whole[part] = whole[part] / 2 - step / 4
        before, step = step, float(torch.maximum(-whole.min() / (1 << (bits - 1)), whole.max() / ((1 << (bits - 1)) - 1)))
        if math.isclose(before, step, rel_tol=1e-12):
            break
    return whole, torch.tensor(sources, device=rows.device)
