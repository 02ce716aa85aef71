"""High-bias absorption: what a channel hardly ever falls below moves into the next layer's biases."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from torch import fx

from dreamquant.errors import OptionError
from dreamquant.network.distribution import clip_ends, has_statistics
from dreamquant.network.edit import bias_of, set_bias
from dreamquant.network.graph import Network, aten, tensor_of
from dreamquant.network.notes import notes, set_notes
from dreamquant.network.operators import CLIPPING, TRANSPOSED, WEIGHTED, argument, is_call
from dreamquant.network.pairs import Pair, along_inputs, pads_with_zeros, pairs

PAPER = "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (ICCV 2019), arXiv 1906.04721"
DEVIATIONS = 3  # below the mean; 0.135 % of normal values lie lower
LEAKY = {aten.leaky_relu.default, aten.prelu.default}


def absorb_bias(network: Network, *, bits: int, padded: bool = False) -> Network:  # noqa: ARG001
    """Moves what a channel exceeds almost always, by its BatchNorm, into the next layer's bias: activations get narrower ranges.

    Section 4.1.3: with c = max(0, beta - 3 gamma), b1' = b1 - c and b2' = b2 + W2 c. Through ReLU and, of which the paper does
    not speak, LeakyReLU and PReLU: above 0 they are the same. The function is kept where activations stay above c, as all but
    0.135 % do if they are normally distributed.

    `padded`: also into layers whose borders are computed from zeros, as published. Those would have to be -c: outputs at the
    border are off by W2 c of the part of the kernel that lies outside, and on MobileNets that costs more than it gains.

    Raises `OptionError` for a network in which no layer knows of a BatchNorm that was folded into it.
    """
    graph = copy.deepcopy(network.graph)
    if not any(notes(node).normal is not None for node in graph.graph.nodes):
        reason = _lacking(graph.graph)
        raise OptionError(f"absorb_bias needs the statistics of BatchNorms that were folded, and the network has none: {reason}")
    for pair in pairs(graph.graph, LEAKY | CLIPPING):
        if _can_absorb(pair, padded):
            _absorb(graph, pair)
    graph.graph.lint()
    graph.recompile()
    return network.with_graph(graph)


def _lacking(graph: fx.Graph) -> str:
    """Why no layer of a graph knows of a BatchNorm."""
    if not has_statistics(graph):
        return "it came without, or with them folded already"
    norms = [node.args[0] for node in graph.nodes if is_call(node, {aten.batch_norm.default})]
    if any(is_call(layer, WEIGHTED) and len(layer.users) == 1 for layer in norms if isinstance(layer, fx.Node)):
        return "put fold_batchnorm before it"
    return (
        "none of its BatchNorms belongs to one layer alone, as those of DenseNets and pre-activation networks do not; leave"
        """ absorb_bias out: --set quantization.transforms='["fold_batchnorm","equalize"]'"""
    )


def _can_absorb(pair: Pair, padded: bool) -> bool:
    """Whether f(x) - c is f(x - c) above c, and all outputs of the second layer see all of its weights."""
    if pair.function is None or notes(pair.first).normal is None or pair.second.target in TRANSPOSED:
        return False
    if pair.function.target not in LEAKY and clip_ends(pair.function) != (0.0, math.inf):
        return False
    return padded or not any(pads_with_zeros(node) for node in (*pair.between, pair.second))


def _absorb(graph: fx.GraphModule, pair: Pair) -> None:
    normal = notes(pair.first).normal
    assert normal is not None
    beta, gamma = normal
    surplus = (beta - DEVIATIONS * gamma).clamp(min=0)
    if not surplus.any():
        return
    first, second = (bias_of(graph, layer) for layer in (pair.first, pair.second))
    weight = tensor_of(graph, argument(pair.second, 1))
    shift = (weight * along_inputs(pair.second, weight, surplus, pair.positions)).flatten(1).sum(1)
    set_bias(graph, pair.first, -surplus if first is None else first - surplus)
    set_bias(graph, pair.second, shift if second is None else second + shift)
    set_notes(pair.first, replace(notes(pair.first), normal=(beta - surplus, gamma)))
