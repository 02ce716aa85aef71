"""What goes into an ONNX graph: exactly one batch of float32 images."""

from __future__ import annotations

import onnx

from dreamquant.errors import ModelError
from dreamquant.network.onnx_import.builder import FLOAT32_ONLY

FLOAT = onnx.TensorProto.FLOAT


def image_input(
    graph: onnx.GraphProto, name: str, given: tuple[int, int, int] | None
) -> tuple[str, tuple[int, int, int], int | None]:
    """The input's name, its (C, H, W) and its batch size, None where the file leaves it open.

    `given` fills in what the file leaves open. Raises ModelError where there is not exactly one such input, a size
    stays unknown, or `given` contradicts the file.
    """
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) != 1 or not inputs[0].type.HasField("tensor_type"):
        listed = "; ".join(_described(entry) for entry in inputs) or "none"
        raise ModelError(f"{name}: a network with one input of images (N, C, H, W) is needed; this one's inputs: {listed}")
    (entry,) = inputs
    if entry.type.tensor_type.elem_type != FLOAT:
        raise ModelError(f"{name}: its input is {_described(entry)}: {FLOAT32_ONLY}")
    sizes = _sizes(entry)
    if len(sizes) != 4:
        raise ModelError(f"{name}: its input is {_described(entry)}; images (N, C, H, W) are needed")
    return entry.name, _image_shape(name, entry, sizes[1:], given), sizes[0]


def _sizes(entry: onnx.ValueInfoProto) -> list[int | None]:
    """Per dimension its size, None where it is open; an input of unknown rank is taken for images."""
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape"):
        return [None] * 4
    return [dimension.dim_value if dimension.dim_value > 0 else None for dimension in tensor.shape.dim]


def _image_shape(
    name: str, entry: onnx.ValueInfoProto, sizes: list[int | None], given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if given is None:
        if None in sizes:
            raise ModelError(
                f"{name}: its input is {_described(entry)}, which leaves sizes open; say which with --input-shape C,H,W"
            )
        given = tuple(size or 0 for size in sizes)  # type: ignore[assignment]
    elif any(size not in (None, wanted) for size, wanted in zip(sizes, given, strict=True)):
        shown = ",".join(map(str, given))
        raise ModelError(f"{name}: its input is {_described(entry)}, which --input-shape {shown} contradicts")
    assert given is not None
    return given


def _described(entry: onnx.ValueInfoProto) -> str:
    if not entry.type.HasField("tensor_type"):
        return f"{entry.name!r}, not a tensor"
    tensor = entry.type.tensor_type
    known = {int(FLOAT): "float32", int(onnx.TensorProto.DOUBLE): "float64"}
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    dtype = known.get(tensor.elem_type) or names.get(tensor.elem_type, f"of the unknown type {tensor.elem_type}")
    if not tensor.HasField("shape"):
        return f"{entry.name!r} {dtype} of unknown shape"
    sizes = ", ".join(str(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim)
    return f"{entry.name!r} {dtype} ({sizes})"
