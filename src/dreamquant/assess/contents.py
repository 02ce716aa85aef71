"""What an ONNX file of any tool holds: its size, its numbers by type, and which of its layers are quantized. Nothing is run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto, external_data_helper, inliner

from dreamquant.network.onnx_import.reading import parse

LAYERS = {"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
INTEGER_LAYERS = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
PACKED_LAYERS = {"MatMulBnb4", "MatMulNBits"}  # weights of few bits, unpacked for a product of floats
_MOVING = {  # operators that hand the values of their first input on
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GlobalMaxPool",
    "Identity",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_SOFTMAX = {"QLinearSoftmax", "Softmax"}
_RESHAPING = {"Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze"}
_WIDE = {
    TensorProto.COMPLEX64,
    TensorProto.COMPLEX128,
    TensorProto.DOUBLE,
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.STRING,
    TensorProto.UINT32,
    TensorProto.UINT64,
}
_NAMES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Contents:
    """An ONNX file, as it is stored; how a runtime computes with it is another matter.

    `bytes` is the size of the file and of the files of weights that it names. `operators` is the number of its nodes, and
    `numbers` how many stored numbers there are of each type. Of the layers that multiply (convolutions and matrix products),
    counted by operator: `quantized` have both factors in fewer than 32 bits: stored so, or come of a DequantizeLinear;
    `weights_only` have weights stored so, and inputs that are not; `floats` are all others. `probabilities` are the outputs
    that come of a softmax.
    """

    path: str
    bytes: int
    operators: int
    numbers: dict[str, int]
    quantized: dict[str, int]
    weights_only: dict[str, int]
    floats: dict[str, int]
    probabilities: list[str]


def contents(path: Path) -> Contents:
    """What is in the ONNX file `path`; ModelError where that is no ONNX file."""
    proto = parse(path)
    graph = (inliner.inline_local_functions(proto) if proto.functions else proto).graph
    found = _Survey()
    found.read(graph)
    return Contents(
        path=str(path),
        bytes=sum(file.stat().st_size for file in [path, *(path.parent / name for name in sorted(found.files))]),
        operators=found.operators,
        numbers=dict(found.numbers.most_common()),
        quantized=_sorted(found.quantized),
        weights_only=_sorted(found.weights_only),
        floats=_sorted(found.floats),
        probabilities=[output.name for output in graph.output if output.name in found.probabilities],
    )


def _sorted(counted: Counter[str]) -> dict[str, int]:
    return dict(sorted(counted.items()))


@dataclass
class _Survey:
    """What is found on one walk over a graph and the graphs within it, whose nodes stand in the order of the computation.

    `stored` has, for every value that is made of stored tensors alone, the size of the largest of them and whether that has
    fewer than 32 bits; `on_grid` the values that are a DequantizeLinear's; `files` are those of weights beside the model's.
    """

    operators: int = 0
    files: set[str] = field(default_factory=set)
    numbers: Counter[str] = field(default_factory=Counter)
    quantized: Counter[str] = field(default_factory=Counter)
    weights_only: Counter[str] = field(default_factory=Counter)
    floats: Counter[str] = field(default_factory=Counter)
    stored: dict[str, tuple[int, bool]] = field(default_factory=dict)
    on_grid: set[str] = field(default_factory=set)
    probabilities: set[str] = field(default_factory=set)

    def read(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._store(tensor, tensor.name)
        for node in graph.node:
            self.operators += 1
            for inner in _inner_graphs(node):
                self.read(inner)
            self._count(node)
            self._follow(node)

    def _store(self, tensor: TensorProto, name: str) -> None:
        size = math.prod(tensor.dims)
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        self.numbers[_NAMES.get(kind, kind)] += size
        self.stored[name] = size, tensor.data_type not in _WIDE
        if external_data_helper.uses_external_data(tensor):
            self.files.add(external_data_helper.ExternalDataInfo(tensor).location)

    def _count(self, node: onnx.NodeProto) -> None:
        kind = node.op_type
        factors = node.input[:2]
        if kind in INTEGER_LAYERS or (kind in LAYERS and all(self._is_narrow(value) for value in factors)):
            self.quantized[kind] += 1
        elif kind in PACKED_LAYERS or (kind in LAYERS and any(self.stored.get(value, (0, False))[1] for value in factors)):
            self.weights_only[kind] += 1
        elif kind in LAYERS:
            self.floats[kind] += 1

    def _is_narrow(self, value: str) -> bool:
        return value in self.on_grid or self.stored.get(value, (0, False))[1]

    def _follow(self, node: onnx.NodeProto) -> None:
        """What is known of a node's outputs, from what is known of its inputs."""
        kind, inputs = node.op_type, [name for name in node.input if name]
        if kind == "Constant":
            self.stored[node.output[0]] = 1, False  # a number or a list of few
            for tensor in _tensors(node.attribute):
                self._store(tensor, node.output[0])
        elif inputs and all(name in self.stored for name in inputs):
            largest = max(self.stored[name] for name in inputs)
            self.stored |= dict.fromkeys(node.output, largest)
        moved = inputs if kind == "Concat" else inputs[:1] if kind in _MOVING else []
        if kind == "DequantizeLinear" or (moved and self.on_grid.issuperset(moved)):
            self.on_grid.update(node.output)
        if kind in _SOFTMAX or (kind in _RESHAPING and self.probabilities.issuperset(inputs[:1])):
            self.probabilities.update(node.output)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    return (attribute.t for attribute in attributes if attribute.type == AttributeProto.TENSOR)
