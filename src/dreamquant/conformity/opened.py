"""A quantized ONNX file as the rules read it: tensors and the grids they stand on, layers and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

Array = NDArray[Any]
LAYERS = {"Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear"}
CLIPPING = ("Relu", "Clip")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class FileGrid:
    """The grid that a QuantizeLinear or DequantizeLinear says, and its `place` in words; `kind` is the type of its integers,
    int8, uint4."""

    node: onnx.NodeProto
    place: str
    scale: Array
    zero_point: Array
    kind: str
    axis: int

    @property
    def signed(self) -> bool:
        return self.kind.startswith("int")

    @property
    def bits(self) -> int:
        """The bits of the type."""
        return int(self.kind.removeprefix("u").removeprefix("int"))

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer of the type."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    def same(self, other: FileGrid) -> bool:
        """Whether the levels are the same."""
        alike = self.kind == other.kind and self.scale.shape == other.scale.shape
        return alike and np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


@dataclass(frozen=True)
class Layer:
    """A node with stored weights: which argument they are, their shape and their grid, or None where they are float."""

    node: onnx.NodeProto
    operator: str
    place: int
    shape: tuple[int, ...]
    grid: FileGrid | None

    @property
    def output_axis(self) -> int:
        """The axis of the weights that runs over output channels."""
        if self.operator == "linear":
            turned = self.node.op_type == "Gemm" and attributes(self.node).get("transB", 0)
            return 0 if turned or self.place == 0 else len(self.shape) - 1
        return int(self.operator == "conv_transpose")


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def called(node: onnx.NodeProto) -> str:
    """What messages call a node: its operator, and its name or that of what it gives."""
    return f"{node.op_type} {node.name or node.output[0]}"


def _without_identities(nodes: Iterable[onnx.NodeProto]) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """The nodes but for identities, which every runtime leaves out, and the values that these give other names."""
    same: dict[str, str] = {}
    kept = []
    for node in nodes:
        if node.op_type == "Identity":
            same[node.output[0]] = same.get(node.input[0], node.input[0])
            continue
        if any(name in same for name in node.input):
            given = [same.get(name, name) for name in node.input]
            own, node = node, onnx.NodeProto()
            node.CopyFrom(own)
            node.input[:] = given
        kept.append(node)
    return kept, same


class QuantizedFile:
    """An ONNX model, and what of it is stored, what is on a grid, and who reads it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes, same = _without_identities(proto.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = helper.get_attribute_value(node.attribute[0])
        self.outputs = {same.get(output.name, output.name) for output in proto.graph.output}
        self.inputs = [value for value in proto.graph.input if value.name not in self._tensors]
        self.computed = self._computed()
        self._types = self._known_types()
        grids = [(node, self._grid(node)) for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
        self.grids = {node.output[0]: grid for node, grid in grids if grid is not None}
        self.dynamic = [node for node, grid in grids if grid is None]  # whose scales are computed

    def value(self, name: str) -> Array | None:
        """A stored tensor, None for what is computed."""
        return numpy_helper.to_array(self._tensors[name]) if name in self._tensors else None

    def _computed(self) -> set[str]:
        """What depends on the images, and not on their sizes alone."""
        found = {value.name for value in self.inputs}
        for node in self.nodes:
            if node.op_type != "Shape" and found.intersection(node.input):
                found.update(node.output)
        return found

    def _known_types(self) -> dict[str, int]:
        try:
            inferred = shape_inference.infer_shapes(self.proto).graph
        except (RuntimeError, ValueError, TypeError):  # it helps where it can
            inferred = self.proto.graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        return {value.name: value.type.tensor_type.elem_type for value in values}

    def is_float(self, name: str) -> bool:
        """Whether a value holds fractions; what nothing is known of does."""
        if name in self._tensors:
            return self._tensors[name].data_type in FLOATS
        return self._types.get(name, 0) in (0, *FLOATS)

    def _grid(self, node: onnx.NodeProto) -> FileGrid | None:
        scale = self.value(node.input[1])
        if scale is None:
            return None
        point = node.input[2] if len(node.input) > 2 else ""
        maker = self.producers.get(node.input[0])
        if not point and node.op_type == DEQUANTIZE and maker is not None and maker.op_type == QUANTIZE and len(maker.input) > 2:
            point = maker.input[2]
        held = self._tensors.get(point) or (self._tensors.get(node.input[0]) if node.op_type == DEQUANTIZE else None)
        kind = "uint8" if held is None else TensorProto.DataType.Name(held.data_type).lower()
        if not kind.removeprefix("u").startswith("int"):
            return None
        zero = self.value(point)
        zero_point = np.zeros(scale.shape) if zero is None else zero.astype(np.float64)
        behind = "" if maker is None else f" behind {called(maker)}"
        return FileGrid(
            node,
            called(node) + (behind or f" of {node.input[0]}"),
            scale.astype(np.float64),
            zero_point,
            kind,
            int(attributes(node).get("axis", 1)),
        )

    def grid(self, name: str) -> FileGrid | None:
        """The grid that a value comes from; None where it is float."""
        maker = self.producers.get(name)
        return self.grids.get(name) if maker is not None and maker.op_type == DEQUANTIZE else None

    def given(self, name: str) -> list[FileGrid]:
        """The grids that a value is put on by those who read it."""
        readers = self.consumers.get(name, [])
        return [self.grids[node.output[0]] for node in readers if node.op_type == QUANTIZE and node.output[0] in self.grids]

    def cut(self, name: str) -> str:
        """What a value is called behind the clipping that is merged with what computes it."""
        while name not in self.outputs:
            readers = self.consumers.get(name, [])
            if len(readers) != 1 or not (readers[0].op_type in CLIPPING or self._is_guard(readers[0])):
                break
            name = readers[0].output[0]
        return name

    def _is_guard(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a Max or Min with one number."""
        return (
            node.op_type in ("Max", "Min") and sum(name not in self.computed for name in node.input) == 1 == len(node.input) - 1
        )

    def is_stored(self, name: str) -> bool:
        """Whether a value comes from stored tensors alone."""
        return bool(name) and name not in self.computed

    def activations(self) -> Iterator[FileGrid]:
        """The grids of computed tensors, by their QuantizeLinear or, where that is elsewhere, their DequantizeLinear."""
        for name, grid in self.grids.items():
            maker = self.producers.get(grid.node.input[0])
            pair = grid.node.op_type == DEQUANTIZE and maker is not None and maker.op_type == QUANTIZE
            if name in self.computed and not pair:
                yield grid

    def constants(self) -> Iterator[FileGrid]:
        """The grids of stored tensors that are no weights or biases of layers."""
        own = {id(layer.grid) for layer in self.layers}
        for name, grid in self.grids.items():
            if grid.node.op_type == DEQUANTIZE and self.is_stored(name) and id(grid) not in own and grid.bits != 32:
                readers = self.consumers.get(name, [])
                if not all(node.op_type in LAYERS and list(node.input).index(name) == 2 for node in readers):
                    yield grid

    @cached_property
    def layers(self) -> list[Layer]:
        """The nodes with stored weights."""
        return list(self._layers())

    def _layers(self) -> Iterator[Layer]:
        for node in self.nodes:
            if node.op_type in LAYERS and len(node.input) > 1:
                places = [place for place in (1, 0) if self.is_stored(node.input[place])]
                if len(places) == 1:
                    yield self._layer(node, places[0])

    def _layer(self, node: onnx.NodeProto, place: int) -> Layer:
        grid = self.grid(node.input[place])
        source = node.input[place] if grid is None else grid.node.input[0]
        maker = self.producers.get(source)
        held = self._tensors.get(source) or self._tensors.get(maker.input[0] if maker is not None and maker.input else "")
        return Layer(node, LAYERS[node.op_type], place, () if held is None else tuple(held.dims), grid)

    def integers(self, grid: FileGrid) -> Array | None:
        """The integers of a stored tensor, which may be stored as floats before a QuantizeLinear; None for what is neither."""
        source = grid.node.input[0]
        found, maker = self.value(source), self.producers.get(source)
        if found is not None:
            return found.astype(np.int32)
        floats = self.value(maker.input[0]) if maker is not None and maker.op_type == QUANTIZE else None
        if floats is None:
            return None
        shape = [1] * floats.ndim
        if grid.scale.size > 1:
            shape[grid.axis] = -1
        rounded = np.rint(floats / grid.scale.reshape(shape)) + grid.zero_point.reshape(shape)
        return rounded.clip(*grid.limits).astype(np.int32)
