"""Small operations on an ONNX model, by value name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper

from dreamquant.errors import ModelError, UnsupportedOperator
from dreamquant.network.onnx_import.standard import lifted, opset_of

Array = NDArray[np.generic]


class Surgery:
    """One model under the knife: its nodes by what they produce, its constants by name. `finish` puts the parts together.

    The model given is not changed.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.nodes: list[onnx.NodeProto] = list(self.proto.graph.node)
        self._producers = {name: node for node in reversed(self.nodes) for name in node.output}
        self.outputs = [output.name for output in self.proto.graph.output]
        self.added: dict[str, onnx.TensorProto] = {}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)}
        self._names |= {tensor.name for tensor in self.proto.graph.initializer}
        self._node_names = {node.name for node in self.nodes}
        self._numbers: Counter[str] = Counter()  # by name: how often it was taken
        self._unused_before = set(self._unused())

    def producer(self, value: str) -> onnx.NodeProto | None:
        """The node that computes a value; None for inputs and stored tensors."""
        return self._producers.get(value)

    def fresh(self, base: str) -> str:
        """A value name that is not taken yet."""
        name = base
        while name in self._names:
            self._numbers[base] += 1
            name = f"{base}_{self._numbers[base]}"
        self._names.add(name)
        return name

    def constant(self, base: str, array: Array | onnx.TensorProto) -> str:
        """Store a tensor under a new name."""
        name = self.fresh(base)
        tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array, order="C"), name)
        tensor.name = name
        self.added[name] = tensor
        return name

    def replace_constant(self, name: str, array: Array) -> None:
        """Give a stored tensor (initializer or Constant node) another value."""
        for tensor in self.proto.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), name))
                return
        node = self.producer(name)
        if node is None or node.op_type != "Constant":
            raise ModelError(f"{name} is not a stored tensor of the ONNX model")
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.asarray(array, order="C"))))

    def insert(self, op_type: str, inputs: list[str], output: str, *, after: str | None = None, **attributes: Any) -> None:
        """Add a node that computes `output`, behind the producer of `after`, at the front where that is no node's output."""
        name = op_type
        while name in self._node_names:
            self._numbers[op_type] += 1
            name = f"{op_type}_{self._numbers[op_type]}"
        self._node_names.add(name)
        node = helper.make_node(op_type, inputs, [output], name=name, **attributes)
        producer = self.producer(after) if after is not None else None
        self.nodes.insert(self._place(producer) + 1 if producer is not None else 0, node)
        self._producers[output] = node

    def _place(self, node: onnx.NodeProto) -> int:
        return next(place for place, other in enumerate(self.nodes) if other is node)

    def rewire(self, value: str, replacement: str, nodes: Iterable[onnx.NodeProto] | None = None) -> None:
        """Let consumers of `value` (all of them, or those of `nodes`) read `replacement`."""
        for node in self.nodes if nodes is None else nodes:
            for index, name in enumerate(node.input):
                if name == value:
                    node.input[index] = replacement

    def consumers(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.input]

    def rename_output(self, value: str, name: str) -> None:
        """Let the producer of `value` call it `name`; its consumers still ask for `value`."""
        producer = self.producer(value)
        if producer is None:
            raise ModelError(f"{value} is computed by no node of the ONNX model")
        producer.output[list(producer.output).index(value)] = name
        self._producers[name] = self._producers.pop(value)

    def remove(self, value: str) -> None:
        """Take out the node that produces `value`."""
        producer = self.producer(value)
        if producer is None:
            raise ModelError(f"{value} is computed by no node of the ONNX model")
        del self.nodes[self._place(producer)]
        for name in producer.output:
            del self._producers[name]

    def require_opset(self, opset: int) -> None:
        """Raise the model's opset where it is lower. To be called before any other change."""
        if opset_of(self.proto) < opset:
            self.__init__(lifted(self.proto, opset, "the ONNX model"))  # type: ignore[misc]

    def finish(self) -> onnx.ModelProto:
        """The model: new nodes in place, stored tensors that lost their last reader dropped."""
        unused = set(self._unused()) - self._unused_before
        self.nodes = [node for node in self.nodes if not (node.op_type == "Constant" and unused.issuperset(node.output))]
        kept = [tensor for tensor in self.proto.graph.initializer if tensor.name not in unused]
        inputs = [value for value in self.proto.graph.input if value.name not in unused]
        graph = self.proto.graph
        del graph.node[:], graph.initializer[:], graph.input[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        graph.initializer.extend([*kept, *(tensor for name, tensor in self.added.items() if name in read)])
        graph.input.extend(inputs)
        return self.proto

    def _unused(self) -> list[str]:
        read = Counter(name for node in self.nodes for name in node.input)
        read.update(self.outputs)
        stored = [tensor.name for tensor in self.proto.graph.initializer]
        stored += [node.output[0] for node in self.nodes if node.op_type == "Constant"]
        return [name for name in stored if not read[name]]


def with_tail(proto: onnx.ModelProto, tail: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """The model with another behind it: `names` says what that's inputs are called in the model.

    Raises `UnsupportedOperator` where it reads what the model does not give, or cannot have the model's opset.
    """
    opset = opset_of(proto)
    lost = [value.name for value in tail.graph.input if value.name not in names]
    if lost:
        raise UnsupportedOperator(
            f"what stays in float behind the network reads {', '.join(lost)}, which a rewritten graph has not"
        )
    if opset_of(tail) != opset:
        tail = lifted(tail, opset, "what stays in float behind the network")
    behind = compose.add_prefix(tail, "tail/", rename_inputs=False, rename_outputs=False)
    for node in behind.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    whole.graph.node.extend(behind.graph.node)
    whole.graph.initializer.extend(behind.graph.initializer)
    kept = {output.name: output for output in (*proto.graph.output, *behind.graph.output)}
    del whole.graph.output[:]
    whole.graph.output.extend(kept[name] for name in (names.get(output.name, output.name) for output in tail.graph.output))
    known = {entry.domain for entry in whole.opset_import}
    whole.opset_import.extend(entry for entry in behind.opset_import if entry.domain not in known)
    return whole
