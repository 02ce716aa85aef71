"""Changes of a graph's stored tensors that the export can follow, and copies to make them in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import Notes, notes, set_notes
from dreamquant.network.operators import bias_node


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """New nodes of the same graph around the same tensors."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, nodes)


def unused_name(module: nn.Module, base: str) -> str:
    """A flat name that begins with `base`, a dotted one, and that nothing in the module has."""
    name = base.replace(".", "_").lstrip("_") or "tensor"
    while hasattr(module, name):
        name += "_"
    return name


def bias_of(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """The bias of a layer with weights, if it has one."""
    bias = bias_node(layer)
    return None if bias is None else tensor_of(module, bias)


def add_buffer(module: nn.Module, base: str, value: Tensor) -> str:
    """Store a tensor; returns under which name, an `unused_name`."""
    name = unused_name(module, base)
    module.register_buffer(name, value)
    return name


def add_tensor(module: fx.GraphModule, base: str, value: Tensor, known: Notes, *, before: fx.Node) -> fx.Node:
    """A new `get_attr` node, ahead of `before`, that reads a copy of `value` under an `unused_name`."""
    name = add_buffer(module, base, value.detach().clone(memory_format=torch.contiguous_format))
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    set_notes(node, replace(known, shape=tuple(value.shape), dtype=value.dtype))
    return node


def set_tensor(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Replace the tensor that a `get_attr` node reads; `changed` in its notes says that it is no longer the file's."""
    setattr(module, str(node.target), value)
    set_notes(node, replace(notes(node), changed=True))


def set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    """Replace the bias of a layer with weights. One that it had not notes whose it is: `gained`."""
    bias = bias_node(layer)
    if bias is not None:
        set_tensor(module, bias, value)
        return
    node = add_tensor(module, f"{layer.name}_bias", value, Notes(gained=layer.name), before=layer)
    layer.args = (*layer.args[:2], node, *layer.args[3:])
