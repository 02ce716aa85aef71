"""BatchNorm folding: a BatchNorm behind a convolution or linear layer becomes part of its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from dreamquant.network.graph import Network, aten, tensor_of
from dreamquant.network.operators import TRANSPOSED, WEIGHTED, is_call, output_channel_axis


def fold_batchnorm(network: Network) -> Network:
    """The same function without the BatchNorms that directly follow a layer with weights of its own.

    With s = gamma / sqrt(var + eps): W' = s W, b' = s (b - mean) + beta. A BatchNorm elsewhere stays. The folded layer's
    `meta["origin"]` becomes the BatchNorm's, its own is kept as `meta["absorbed"]`: that value is no longer computed.
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
    stored = [argument for argument in layer.args[1:3] if isinstance(argument, fx.Node)]
    return all(argument.op == "get_attr" and len(argument.users) == 1 for argument in stored)


def _fold(module: fx.GraphModule, batch_norm: fx.Node) -> None:
    layer = batch_norm.args[0]
    assert isinstance(layer, fx.Node)
    gamma, beta, mean, var = (
        tensor_of(module, argument) if isinstance(argument, fx.Node) else None for argument in batch_norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    eps = float(batch_norm.args[7])  # type: ignore[arg-type]
    scale = torch.rsqrt(var + eps) * (1.0 if gamma is None else gamma)

    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    weight = tensor_of(module, weight_node)
    shape = [1] * weight.dim()
    shape[output_channel_axis(layer)] = -1
    bias = _bias(module, layer)
    shift = (mean.new_zeros(mean.shape) if bias is None else bias) - mean
    set_tensor(module, weight_node, weight * scale.view(shape))
    set_bias(module, layer, shift * scale + (0.0 if beta is None else beta))

    layer.meta["absorbed"] = layer.meta.get("origin")
    layer.meta["origin"] = batch_norm.meta.get("origin")
    if layer.meta["origin"] is None:
        del layer.meta["origin"]
    batch_norm.replace_all_uses_with(layer)
    module.graph.erase_node(batch_norm)


def _bias(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    bias = layer.args[2] if len(layer.args) > 2 else None
    return tensor_of(module, bias) if isinstance(bias, fx.Node) else None


def set_tensor(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Replace the tensor that a `get_attr` node reads; `meta["changed"]` says that it is no longer the file's."""
    setattr(module, str(node.target), value)
    node.meta["changed"] = True


def set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    """Replace the bias of a layer with weights. One that it had not gets `meta["gained"]`, the layer's name."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    if isinstance(bias, fx.Node):
        set_tensor(module, bias, value)
        return
    name = f"{layer.name}_bias"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value)
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(name)
    node.meta.update(shape=tuple(value.shape), dtype=value.dtype, gained=layer.name)
    layer.args = (*layer.args[:2], node, *layer.args[3:])
