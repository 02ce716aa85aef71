"""Changes of a graph's stored tensors that the export can follow."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import Notes, notes, set_notes


def bias_of(module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """The bias of a layer with weights, if it has one."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return tensor_of(module, bias) if isinstance(bias, fx.Node) else None


def set_tensor(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Replace the tensor that a `get_attr` node reads; `changed` in its notes says that it is no longer the file's."""
    setattr(module, str(node.target), value)
    set_notes(node, replace(notes(node), changed=True))


def set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    """Replace the bias of a layer with weights. One that it had not notes whose it is: `gained`."""
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
    set_notes(node, Notes(tuple(value.shape), value.dtype, gained=layer.name))
    layer.args = (*layer.args[:2], node, *layer.args[3:])
