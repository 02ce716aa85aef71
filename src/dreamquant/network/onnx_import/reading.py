"""An .onnx file -> a checked ModelProto; every way to fail is one line that names the file and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import checker, external_data_helper, inliner, numpy_helper

from dreamquant.errors import ModelError, blamed
from dreamquant.onnx_guard import check as check_model

UNKNOWN_RANK = "Field 'shape' of 'type' is required"  # the checker wants what exporters may leave out and runtimes accept


def read(path: Path) -> onnx.ModelProto:
    """The model in the file `path` with its external data and its local functions inlined; raises ModelError."""
    proto = parse(path)
    _load_external_data(proto, path)
    with blamed(ModelError, f"{path}: its functions cannot be written out"):
        return inliner.inline_local_functions(proto) if proto.functions else proto


def parse(path: Path) -> onnx.ModelProto:
    """The model in the file `path` as it stands there, without its external data; raises ModelError."""
    if not path.exists():
        raise ModelError(f"{path}: there is no such file")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; an .onnx file is needed")
    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty")
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise ModelError(f"{path}: is not an ONNX file, or is damaged or cut short") from error
    check_model(proto, path)
    if not proto.graph.node:
        raise ModelError(f"{path}: holds no ONNX graph; it is not an ONNX file, or is damaged")
    return proto


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    with blamed(ModelError, f"{path}: its external data cannot be read"):
        external_data_helper.load_external_data_for_model(proto, str(path.parent))


def check(path: Path) -> None:
    """Run ONNX's own checker on the file `path`; raises ModelError with its first line."""
    with blamed(ModelError, f"{path}: is not a valid ONNX model"):
        try:
            checker.check_model(str(path))
        except checker.ValidationError as error:
            if UNKNOWN_RANK not in str(error):
                raise


def check_finite(proto: onnx.ModelProto, name: str) -> None:
    """Raise ModelError where a stored tensor holds NaN, or infinities that are not a mask's or a bound's."""
    for tensor in _stored(proto.graph):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        with blamed(ModelError, f"{name}: tensor {tensor.name!r} cannot be read"):
            array = numpy_helper.to_array(tensor)
        wrong = int((~np.isfinite(array)).sum())
        if wrong and (np.isnan(array).any() or array[np.isfinite(array)].any()):
            raise ModelError(f"{name}: tensor {tensor.name!r} holds {wrong} values that are NaN or infinite")


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
