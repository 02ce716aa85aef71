"""What goes into an ONNX graph: exactly one batch of images, in float32, half precision or bytes."""

from __future__ import annotations

from typing import NamedTuple

import onnx

from dreamquant.errors import ModelError
from dreamquant.network.front import TO_FIRST, channels_first
from dreamquant.runtime import guessed_layout

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
KINDS = {int(FLOAT): "float32", int(HALF): "float16", int(onnx.TensorProto.UINT8): "uint8"}
ELEMENTWISE = {"Cast", "Identity", "Add", "Sub", "Mul", "Div"}


class ImageInput(NamedTuple):
    """An ONNX graph's input: its name, its images' (C, H, W), its batch size or None, and how the file takes images.

    `inner` is the value that stands for float32 images (N, C, H, W): the input, or what its first Cast and Transpose make of it.
    """

    name: str
    shape: tuple[int, int, int]
    batch: int | None
    layout: str
    dtype: str
    inner: str


def image_input(graph: onnx.GraphProto, name: str, given: tuple[int, int, int] | None, layout: str | None = None) -> ImageInput:
    """The one input of a graph; `given` (C, H, W) fills in what the file leaves open, `layout` is the file's where it is stated.

    Else the layout is what the first Transpose makes of the image, or what its sizes tell. Raises ModelError where there is not
    exactly one such input, a size stays unknown, or `given` contradicts the file.
    """
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) != 1 or not inputs[0].type.HasField("tensor_type"):
        listed = "; ".join(_described(entry) for entry in inputs) or "none"
        raise ModelError(f"{name}: a network with one input of images (N, C, H, W) is needed; this one's inputs: {listed}")
    (entry,) = inputs
    dtype = KINDS.get(entry.type.tensor_type.elem_type)
    if dtype is None:
        raise ModelError(
            f"{name}: its input is {_described(entry)}: images in {', '.join(KINDS.values())} are read; convert the file first"
        )
    sizes = _sizes(entry)
    if len(sizes) != 4:
        raise ModelError(f"{name}: its input is {_described(entry)}; images (N, C, H, W) are needed")
    if layout is None:
        layout = "NHWC" if _turned(graph, entry.name) else guessed_layout(sizes)
    shape = _image_shape(name, entry, sizes[1:], given, layout)
    return ImageInput(entry.name, shape, sizes[0], layout, dtype, _inner(graph, entry.name, layout, dtype))


def _readers(graph: onnx.GraphProto, value: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if value in node.input]


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])


def _turned(graph: onnx.GraphProto, value: str) -> bool:
    """Whether a Transpose moves the image's channels from the last axis to the first, at once or behind casts, sums and
    products."""
    seen: set[str] = set()
    while value not in seen:
        seen.add(value)
        readers = _readers(graph, value)
        if len(readers) != 1:
            return False
        (node,) = readers
        if node.op_type == "Transpose":
            return _perm(node) == TO_FIRST
        if node.op_type not in ELEMENTWISE or not node.output:
            return False
        value = node.output[0]
    return False


def _inner(graph: onnx.GraphProto, value: str, layout: str, dtype: str) -> str:
    """The value behind the input's own Cast and Transpose, as far as nothing else reads what is before them."""
    cast, turn = dtype != "float32", layout == "NHWC"
    while cast or turn:
        readers = _readers(graph, value)
        if len(readers) != 1 or not readers[0].output:
            break
        (node,) = readers
        if cast and node.op_type == "Cast" and any(one.name == "to" and one.i == FLOAT for one in node.attribute):
            cast = False
        elif turn and node.op_type == "Transpose" and _perm(node) == TO_FIRST:
            turn = False
        else:
            break
        value = node.output[0]
    return value


def _sizes(entry: onnx.ValueInfoProto) -> list[int | None]:
    """Per dimension its size, None where it is open; an input of unknown rank is taken for images."""
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape"):
        return [None] * 4
    return [dimension.dim_value if dimension.dim_value > 0 else None for dimension in tensor.shape.dim]


def _image_shape(
    name: str, entry: onnx.ValueInfoProto, sizes: list[int | None], given: tuple[int, int, int] | None, layout: str
) -> tuple[int, int, int]:
    if given is None:
        if None in sizes:
            raise ModelError(
                f"{name}: its input is {_described(entry)}, which leaves sizes open; say which with --input-shape C,H,W"
            )
        return channels_first([size or 0 for size in sizes], layout)
    found: tuple[int | None, ...] = (sizes[2], sizes[0], sizes[1]) if layout == "NHWC" else tuple(sizes)
    if any(size not in (None, wanted) for size, wanted in zip(found, given, strict=True)):
        shown = ",".join(map(str, given))
        raise ModelError(f"{name}: its input is {_described(entry)}, which --input-shape {shown} contradicts")
    return given


def _described(entry: onnx.ValueInfoProto) -> str:
    if not entry.type.HasField("tensor_type"):
        return f"{entry.name!r}, not a tensor"
    tensor = entry.type.tensor_type
    known = KINDS | {int(onnx.TensorProto.DOUBLE): "float64"}
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    dtype = known.get(tensor.elem_type) or names.get(tensor.elem_type, f"of the unknown type {tensor.elem_type}")
    if not tensor.HasField("shape"):
        return f"{entry.name!r} {dtype} of unknown shape"
    sizes = ", ".join(str(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim)
    return f"{entry.name!r} {dtype} ({sizes})"
