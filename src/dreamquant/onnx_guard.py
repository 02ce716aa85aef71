"""What an .onnx file may not hold, whoever reads it next: ONNX's own libraries trust it further than they should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper

from dreamquant.errors import ModelError, blamed
from dreamquant.limits import check_memory

LARGEST_NODES = 10**6  # that functions may become, written out
_ELEMENT = 8  # bytes, of the widest type


def check_file(path: Path) -> None:
    """`check` of the file `path`, before a runtime reads it; what is no ONNX file is left for the runtime to refuse."""
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (OSError, DecodeError):
        return
    check(proto, path)


def check(proto: onnx.ModelProto, path: Path) -> None:
    """Raise ModelError where names are no text, functions have no end, or stored tensors would unpack to more than the limit."""
    with blamed(ModelError, f"{path}: is damaged"):
        for text in _texts(proto):
            if isinstance(text, bytes) or not text.isascii():
                _check_text(text, path)
        _check_functions(proto, path)
        _check_sparse(proto, path)
        _check_external(proto, path)


def _texts(message: Any) -> Iterator[str | bytes]:
    """All texts in a message; those that are no UTF-8 are bytes."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _texts(part)


def _check_text(text: str | bytes, path: Path) -> None:
    try:
        whole = text.decode() if isinstance(text, bytes) else text
        whole.encode()
    except UnicodeError:
        raise ModelError(f"{path}: holds the name {text[:40]!r}, which is no text (UTF-8)") from None


def _check_functions(proto: onnx.ModelProto, path: Path) -> None:
    functions = {(function.domain, function.name): function for function in proto.functions}
    sizes: dict[tuple[str, str], int] = {}

    def nodes_of(nodes: Any, above: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            total += 1
            key = (node.domain, node.op_type)
            if key in functions:
                total += written_out(key, above)
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
                total += sum(nodes_of(graph.node, above) for graph in graphs)
        return total

    def written_out(key: tuple[str, str], above: tuple[tuple[str, str], ...]) -> int:
        if key in above:
            raise ModelError(f"{path}: its function {key[1]!r} calls itself")
        if key not in sizes:
            sizes[key] = nodes_of(functions[key].node, (*above, key))
        return sizes[key]

    if functions:
        count = nodes_of(proto.graph.node, ())
        if count > LARGEST_NODES:
            raise ModelError(f"{path}: its functions written out are {count:.3g} nodes; at most {LARGEST_NODES:,} are read")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto | onnx.SparseTensorProto]:
    yield from graph.initializer
    yield from graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def _check_sparse(proto: onnx.ModelProto, path: Path) -> None:
    dense = [math.prod(tensor.dims) for tensor in _tensors(proto.graph) if isinstance(tensor, onnx.SparseTensorProto)]
    check_memory(_ELEMENT * sum(dense), f"{path}: its sparse tensors", ModelError)


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    total = 0
    for tensor in _tensors(proto.graph):
        if isinstance(tensor, onnx.SparseTensorProto) or not external_data_helper.uses_external_data(tensor):
            continue
        with blamed(ModelError, f"{path}: its external data cannot be read"):
            info = external_data_helper.ExternalDataInfo(tensor)
            file = path.parent / info.location
            total += info.length or (file.stat().st_size if file.is_file() else 0)
    check_memory(total, f"{path}: its external data", ModelError)
