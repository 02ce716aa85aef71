"""BatchNorm folding: a BatchNorm behind a convolution or linear layer becomes part of its weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx

from dreamquant.network.edit import bias_of, set_bias, set_tensor
from dreamquant.network.graph import Network, aten, tensor_of
from dreamquant.network.notes import notes, set_notes
from dreamquant.network.operators import TRANSPOSED, WEIGHTED, argument, is_call, output_channel_axis

PAPER = "Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (CVPR 2018)"


def fold_batchnorm(network: Network, *, bits: int = 8) -> Network:  # noqa: ARG001
    """Makes each BatchNorm that directly follows a layer with weights of its own a part of those weights.

    With s = gamma / sqrt(var + eps): W' = s W, b' = s (b - mean) + beta. A BatchNorm elsewhere stays. The folded layer's
    notes have the BatchNorm's `origin`, its own is added to `absorbed`: that value is no longer computed. `normal` is
    (beta, |gamma|): mean and deviation that the training data gave each channel of the layer's output.
    """
    graph = copy.deepcopy(network.graph)
    for node in list(graph.graph.nodes):
        if is_call(node, {aten.batch_norm.default}) and _foldable(node):
            _fold(graph, node)
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return network.with_graph(graph)


def _foldable(batch_norm: fx.Node) -> bool:
    layer = batch_norm.args[0]
    if not isinstance(layer, fx.Node) or not is_call(layer, WEIGHTED) or len(layer.users) != 1:
        return False
    if layer.target in TRANSPOSED and len(layer.args) > 6 and layer.args[6] != 1:
        return False  # grouped transposed convolutions order their output channels differently
    stored = [one for one in layer.args[1:3] if isinstance(one, fx.Node)]
    return all(one.op == "get_attr" and len(one.users) == 1 for one in stored)


def _fold(module: fx.GraphModule, batch_norm: fx.Node) -> None:
    layer = argument(batch_norm, 0)
    gamma, beta = (tensor_of(module, one) if isinstance(one, fx.Node) else None for one in batch_norm.args[1:3])
    mean, var = (tensor_of(module, argument(batch_norm, place)) for place in (3, 4))
    eps = float(batch_norm.args[7])  # type: ignore[arg-type]
    scale = torch.rsqrt(var + eps) * (1.0 if gamma is None else gamma)

    weight = tensor_of(module, argument(layer, 1))
    shape = [1] * weight.dim()
    shape[output_channel_axis(layer)] = -1
    bias = bias_of(module, layer)
    shift = (mean.new_zeros(mean.shape) if bias is None else bias) - mean
    set_tensor(module, argument(layer, 1), weight * scale.view(shape))
    set_bias(module, layer, shift * scale + (0.0 if beta is None else beta))
    beta = torch.zeros_like(mean) if beta is None else beta.clone()
    gamma = torch.ones_like(mean) if gamma is None else gamma.abs()
    before = notes(layer)
    absorbed = before.absorbed if before.origin is None else (*before.absorbed, before.origin)
    set_notes(layer, replace(before, normal=(beta, gamma), absorbed=absorbed, origin=notes(batch_norm).origin))
    batch_norm.replace_all_uses_with(layer)
    module.graph.erase_node(batch_norm)
