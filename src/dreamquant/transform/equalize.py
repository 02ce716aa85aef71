"""Cross-layer equalization: what one layer's channels are too large for, the next layer's weights take over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError, unknown
from dreamquant.network.distribution import clip_ends
from dreamquant.network.edit import add_buffer, bias_of, set_bias, set_tensor
from dreamquant.network.graph import Network, aten, input_node, tensor_of
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import notes, set_notes, shape_of
from dreamquant.network.operators import CLIPPING, argument
from dreamquant.network.pairs import Pair, along_inputs, along_outputs, input_rows, output_rows, pairs

PAPER = "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (ICCV 2019), arXiv 1906.04721"
HOMOGENEOUS = {aten.leaky_relu.default, aten.prelu.default}  # f(s x) = s f(x) for any s > 0, as for ReLU
NOTHING = 1e-6  # of the widest channel's range: a channel narrower than that is dead, and would only get a huge bias
CLIPS = ("exact", "relu", "skip")

Weights = dict[fx.Node, Tensor]  # by the node that reads them
RANGES: dict[str, Callable[[Tensor], Tensor]] = {  # of each row (channels, n) of a weight
    "symmetric": lambda rows: rows.abs().amax(1),
    "asymmetric": lambda rows: rows.amax(1) - rows.amin(1),
}


def equalize(
    network: Network,
    *,
    bits: int,  # noqa: ARG001
    sweeps: int = 20,
    tolerance: float = 1e-3,
    ranges: str = "symmetric",
    clip: str = "exact",
) -> Network:
    """Gives channel i of a layer and the weights that read it the same range, through ReLU, LeakyReLU and the like.

    Section 4.1.2: W1_i and b1_i are divided by s_i and the weights that read channel i multiplied by it, s_i = sqrt(r1_i / r2_i);
    all pairs in turn, until no s of a sweep is farther than `tolerance` from 1, or after `sweeps`. `ranges`: r is max |w|
    ("symmetric") or max w - min w ("asymmetric"). A channel of no range (below 1e-6 of the widest) on either side stays.

    `clip` says what becomes of min(max(x, 0), 6). "exact": each channel is cut off at 6 / s_i, by an operation of its own;
    "relu": it is not cut off any more, as published, which is another function where activations reach 6; "skip": the layers
    around it are not equalized. Raises `OptionError` for values that are not known.
    """
    for name, value, known in (("ranges", ranges, RANGES), ("clip", clip, CLIPS)):
        if value not in known:
            raise OptionError(unknown(f"equalize.{name}", value, known))
    if sweeps < 1 or tolerance < 0:
        raise OptionError(f"equalize has sweeps={sweeps}, tolerance={tolerance}; they must be at least 1 and 0")
    graph = copy.deepcopy(network.graph)
    found = [pair for pair in pairs(graph.graph, HOMOGENEOUS | CLIPPING) if _scales(pair, clip)]
    layers = {layer for pair in found for layer in (pair.first, pair.second)}
    weights: Weights = {layer: tensor_of(graph, argument(layer, 1)).double() for layer in layers}
    scales = {pair: torch.ones_like(output_rows(pair.first, weights[pair.first])[:, 0]) for pair in found}
    for _ in range(sweeps):
        farthest = 0.0
        for pair in found:
            scale = _balance(pair, weights, RANGES[ranges])
            scales[pair] *= scale
            farthest = max(farthest, float((scale - 1).abs().max()))
        if farthest <= tolerance:
            break
    for layer in layers:
        set_tensor(graph, argument(layer, 1), weights[layer].float())
    changed = [_scale_output(graph, pair, scale, clip) for pair, scale in scales.items()]
    graph.graph.lint()
    graph.recompile()
    if not any(changed):
        return network.with_graph(graph)
    record_shapes(graph, torch.zeros(shape_of(input_node(graph.graph)), device=network.device))
    return network.rebuilt(graph)


def _scales(pair: Pair, clip: str) -> bool:
    """Whether a scale of the first layer's channels can be taken back in the second."""
    if pair.function is None or pair.function.target in HOMOGENEOUS:
        return True
    low, high = clip_ends(pair.function)
    return low == 0 and (high == torch.inf or (high > 0 and clip != "skip"))


def _balance(pair: Pair, weights: Weights, channel_ranges: Callable[[Tensor], Tensor]) -> Tensor:
    """Equalize one pair; returns what its first layer's channels were multiplied by, 1 / s."""
    first, second = weights[pair.first], weights[pair.second]
    one, other = channel_ranges(output_rows(pair.first, first)), channel_ranges(input_rows(pair.second, second, pair.positions))
    alive = (one > NOTHING * one.max()) & (other > NOTHING * other.max())
    scale = torch.where(alive, (other / one).sqrt(), 1.0)
    weights[pair.first] = first * along_outputs(pair.first, first, scale)
    weights[pair.second] = weights[pair.second] / along_inputs(pair.second, second, scale, pair.positions)
    return scale


def _scale_output(graph: fx.GraphModule, pair: Pair, scale: Tensor, clip: str) -> bool:
    """Scale what else belongs to the first layer's channels: bias, statistics and the clip; whether that took other nodes."""
    layer, function = pair.first, pair.function
    bias = bias_of(graph, layer)
    if bias is not None:
        set_bias(graph, layer, (bias * scale).float())
    normal = notes(layer).normal
    if normal is not None:
        set_notes(layer, replace(notes(layer), normal=((normal[0] * scale).float(), (normal[1] * scale).float())))
    if function is None or function.target in HOMOGENEOUS or clip_ends(function)[1] == torch.inf:
        return False
    if clip == "relu":
        function.target, function.args, function.kwargs = aten.relu.default, function.args[:1], {}
        return True
    ends = (clip_ends(function)[1] * scale).float()
    function.target, function.args, function.kwargs = aten.hardtanh.default, (function.args[0], 0.0, float(ends.max())), {}
    name = add_buffer(graph, f"{function.name}_ends", ends.view(1, -1, *[1] * (len(shape_of(function)) - 2)))
    with graph.graph.inserting_after(function):
        cut = graph.graph.call_function(aten.minimum.default, (function,))
    function.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
    with graph.graph.inserting_before(function):
        cut.args = (function, graph.graph.get_attr(name))
    return True
