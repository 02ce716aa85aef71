"""Changes of a graph's stored tensors that the export can follow."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx, nn

from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import Notes, notes, set_notes
from dreamquant.network.operators import bias_node


def bias_of(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """The bias of a layer with weights, if it has one."""
    bias = bias_node(layer)
    return None if bias is None else tensor_of(module, bias)


def add_buffer(module: nn.Module, name: str, value: Tensor) -> str:
    """Store a tensor; returns under which name: `name`, with underscores behind it where that is taken."""
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value)
    return name


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
    with module.graph.inserting_before(layer):
        node = module.graph.get_attr(add_buffer(module, f"{layer.name}_bias", value))
    set_notes(node, Notes(tuple(value.shape), value.dtype, gained=layer.name))
    layer.args = (*layer.args[:2], node, *layer.args[3:])
