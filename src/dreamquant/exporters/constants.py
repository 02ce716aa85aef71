"""What a model computes from stored tensors alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dreamquant.errors import VerificationError
from dreamquant.runtime import computed

REFUSED = "the exported file does not do what was measured"


def stored_values(proto: onnx.ModelProto, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Values of these names, computed from nothing but what the file stores."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    others = sorted(set(names) - set(stored))
    wanted = set(others)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(proto.graph.node):
        if wanted.intersection(node.output):
            nodes.insert(0, node)
            wanted.update(node.input)
    strange = wanted.intersection(value.name for value in proto.graph.input) - set(stored)
    if strange:
        raise VerificationError(f"{REFUSED}: its weights are computed from {', '.join(sorted(strange))}")
    found = {name: numpy_helper.to_array(stored[name]) for name in names if name in stored}
    if others:
        outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in others]
        graph = helper.make_graph(nodes, "stored", [], outputs, [stored[name] for name in sorted(wanted & set(stored))])
        model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
        found |= computed(model.SerializeToString())
    return found
