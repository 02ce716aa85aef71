"""BatchNorm folding: a BatchNorm behind a convolution or linear layer, or what is left of one, becomes part of its weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from dreamquant.network.edit import bias_of, set_bias, set_tensor
from dreamquant.network.graph import Network, aten, device_of, tensor_of
from dreamquant.network.notes import notes, set_notes, shape_of
from dreamquant.network.operators import LINEARS, TRANSPOSED, WEIGHTED, argument, is_call
from dreamquant.network.pairs import along_outputs

PAPER = "Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (CVPR 2018)"
EITHER_WAY = {aten.add.Tensor, aten.mul.Tensor}  # the layer's output may be either argument; else it is the first
ARITHMETIC = EITHER_WAY | {aten.sub.Tensor, aten.div.Tensor}


class _Affine(NamedTuple):
    """What a node makes of each channel y of the layer before it, (y - mean) scale + shift; `normal` as in `Notes`. All (C,)."""

    mean: Tensor
    scale: Tensor
    shift: Tensor
    normal: tuple[Tensor, Tensor] | None


def fold_batchnorm(network: Network, *, bits: int = 8) -> Network:  # noqa: ARG001
    """Makes each BatchNorm that directly follows a layer with weights of its own a part of those weights.

    With s = gamma / sqrt(var + eps): W' = s W, b' = s (b - mean) + beta. So are constants that each channel is multiplied by,
    divided by, or that are added to it: a frozen BatchNorm, a layer's scale, the bias that a file adds behind a matrix product.
    What stands elsewhere stays. The folded layer's notes have the `origin` of what was folded, its own is added to `absorbed`:
    that value is no longer computed. `normal` is (beta, |gamma|): mean and deviation that the training data gave each channel of
    the layer's output.
    """
    graph = copy.deepcopy(network.graph)
    for node in list(graph.graph.nodes):
        layer = _layer(node)
        affine = None if layer is None else _affine(graph, node, layer)
        if layer is not None and affine is not None:
            _fold(graph, node, layer, affine)
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    return network.with_graph(graph)


def _layer(node: fx.Node) -> fx.Node | None:
    """The layer whose output a BatchNorm or a constant changes, if nobody else reads it, or its weights."""
    if not is_call(node, ARITHMETIC | {aten.batch_norm.default}):
        return None
    layer = next((one for one in node.args[: 2 if node.target in EITHER_WAY else 1] if is_call(one, WEIGHTED)), None)
    if not isinstance(layer, fx.Node) or len(layer.users) != 1 or notes(layer).inner or notes(node).inner:
        return None
    if layer.target in TRANSPOSED and len(layer.args) > 6 and layer.args[6] != 1:
        return None  # grouped transposed convolutions order their output channels differently
    stored = [one for one in layer.args[1:3] if isinstance(one, fx.Node)]
    return layer if all(one.op == "get_attr" and len(one.users) == 1 for one in stored) else None


def _affine(module: fx.GraphModule, node: fx.Node, layer: fx.Node) -> _Affine | None:
    """What a node does to each channel of a layer; None where it does another thing."""
    if node.target is aten.batch_norm.default:
        if is_call(layer, LINEARS) and len(shape_of(layer)) > 2:
            return None  # its channels are not the layer's
        gamma, beta = (tensor_of(module, one) if isinstance(one, fx.Node) else None for one in node.args[1:3])
        mean, var = (tensor_of(module, argument(node, place)) for place in (3, 4))
        scale = torch.rsqrt(var + float(node.args[7])) * (1.0 if gamma is None else gamma)  # type: ignore[arg-type]
        beta = torch.zeros_like(mean) if beta is None else beta.clone()
        return _Affine(mean, scale, beta, (beta, torch.ones_like(mean) if gamma is None else gamma.abs()))
    other = node.args[1] if node.args[0] is layer else node.args[0]
    constant = _by_channel(module, other, layer)
    if constant is None or node.kwargs:
        return None
    mean, scale, shift = torch.zeros_like(constant), torch.ones_like(constant), torch.zeros_like(constant)
    if node.target is aten.add.Tensor:
        shift = constant
    elif node.target is aten.sub.Tensor:
        mean = constant
    else:
        scale = constant if node.target is aten.mul.Tensor else 1 / constant
    before = notes(layer).normal
    normal = before and ((before[0] - mean) * scale + shift, before[1] * scale.abs())
    return _Affine(mean, scale, shift, normal) if bool((scale + shift).isfinite().all()) else None


def _by_channel(module: fx.GraphModule, constant: object, layer: fx.Node) -> Tensor | None:
    """A number, or a stored tensor of one number for each output channel of a layer, as (C,); None for all else."""
    shape = shape_of(layer)
    axis = len(shape) - 1 if is_call(layer, LINEARS) else 1
    if isinstance(constant, int | float):
        return torch.full((shape[axis],), float(constant), device=device_of(module))
    if not isinstance(constant, fx.Node) or constant.op != "get_attr":
        return None
    value = tensor_of(module, constant)
    sizes = [1] * (len(shape) - value.dim()) + list(value.shape)
    channels = sizes.pop(axis) if len(sizes) == len(shape) else 0
    fits = channels in (1, shape[axis]) and all(size == 1 for size in sizes) and value.is_floating_point()
    return value.flatten().expand(shape[axis]) if fits else None


def _fold(module: fx.GraphModule, node: fx.Node, layer: fx.Node, affine: _Affine) -> None:
    weight, bias = tensor_of(module, argument(layer, 1)), bias_of(module, layer)
    if not bool((affine.scale == 1).all()):
        set_tensor(module, argument(layer, 1), weight * along_outputs(layer, weight, affine.scale))
    shift = affine.mean.new_zeros(affine.mean.shape) if bias is None else bias
    set_bias(module, layer, (shift - affine.mean) * affine.scale + affine.shift)
    before = notes(layer)
    absorbed = before.absorbed if before.origin is None else (*before.absorbed, before.origin)
    set_notes(layer, replace(before, normal=affine.normal, absorbed=absorbed, origin=notes(node).origin))
    node.replace_all_uses_with(layer)
    module.graph.erase_node(node)
