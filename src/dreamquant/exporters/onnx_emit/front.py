"""The front of an emitted model: it takes images in the layout and number type that the network's file or module takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import fx

from dreamquant.network.front import TO_FIRST
from dreamquant.network.input_space import InputSpace
from dreamquant.network.notes import notes, set_notes

KINDS = {"float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def take_as_fed(proto: onnx.ModelProto, space: InputSpace, image: fx.Node) -> None:
    """Put a Cast and a Transpose before everything else, as far as `space` asks for them; `image` gets the name of what they
    give."""
    steps: list[tuple[str, dict[str, Any]]] = [("Cast", {"to": TensorProto.FLOAT})] if space.dtype in KINDS else []
    steps += [("Transpose", {"perm": TO_FIRST})] if space.layout == "NHWC" else []
    if not steps:
        return
    graph, (entry,) = proto.graph, proto.graph.input
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {one.name for one in graph.initializer}
    value, added = entry.name, []
    for kind, attributes in steps:
        inner = f"{entry.name}_{kind.lower()}"
        while inner in taken:
            inner += "_"
        added.append(helper.make_node(kind, [value], [inner], name=inner, **attributes))
        value = inner
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == entry.name:
                node.input[index] = value
    for node in reversed(added):
        graph.node.insert(0, node)
    set_notes(image, replace(notes(image), origin=value))
    tensor = entry.type.tensor_type
    tensor.elem_type = KINDS.get(space.dtype, TensorProto.FLOAT)
    if space.layout == "NHWC":
        sizes = list(tensor.shape.dim)
        del tensor.shape.dim[:]
        tensor.shape.dim.extend([sizes[0], *sizes[2:], sizes[1]])
