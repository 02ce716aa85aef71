"""`.pt2` archives of `torch.export`, read as data.

torch's own reader runs code that a file may hold: it unpickles example inputs and objects, evaluates symbolic sizes, executes
guards, imports what a tree of arguments names, calls whatever in `torch` an operator is named after, and writes the names of
nodes and arguments into Python that it compiles. Here the archive is taken apart first. What a network is made of (graph,
signature, tensors) is checked field by field against torch's schema, texts by what they stand for, and built anew; torch is
handed nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import json
import logging
import math
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import (
    ExportedProgramDeserializer,
    _dict_to_dataclass,
    deserialize_device,
    deserialize_scalar_type,
)
from torch._export.serde.union import _Union

from dreamquant.errors import ModelError
from dreamquant.network import archive_texts as texts
from dreamquant.network.archive_texts import Refused

EXTRA = "extra/"  # a member's name begins so where it was given to torch.export.save as an extra file
_PROGRAM, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_KINDS = ("weights", "constants")
_OWN = "a file of your own is read with --trust-model (in Python: trust=True)"
_LOGGERS = ("torch.export", "torch._export.serde.serialize", "torch.export.pt2_archive._package")
_ENCRYPTED = 1  # in a member's flags


def read_archive(path: Path, *, trust: bool = False) -> torch.export.ExportedProgram:
    """The program in an archive of `torch.export.save`, without running anything that the file may hold.

    Example inputs, the stack traces and module names of nodes, and guards are left out. With `trust`, torch's own reader reads
    the file, and the file can run code. Raises `ModelError` for a file that is none, is damaged, or is no plain data.
    """
    members = _members(path)
    if trust:
        return _quietly(lambda: torch.export.load(path), path)
    try:
        return _quietly(lambda: _program(members), path)
    except Refused as error:
        raise ModelError(f"{path} is not read, for torch would run code from it: {error}; {_OWN}") from error


def extra_files(path: Path) -> dict[str, str]:
    """The texts that `torch.export.save` was given as extra files, by name; what is no text is left out."""
    found = {name.removeprefix(EXTRA): data for name, data in _members(path, EXTRA).items()}
    return {name: data.decode(errors="replace") for name, data in found.items()}


def _quietly(read: Callable[[], torch.export.ExportedProgram], path: Path) -> torch.export.ExportedProgram:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except Refused:
        raise
    except Exception as error:  # whatever the wrong fields lead to
        raise ModelError(f"{path} cannot be read by torch {torch.__version__}: {_line(error)}") from error
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


# ---- the container


def _members(path: Path, below: str = "") -> dict[str, bytes]:
    """The members of an archive whose names begin with `below`, without the folder that all lie in.

    torch stores them uncompressed, so that what is read can never be larger than the file.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = _checked_members(archive, path.stat().st_size, str(path))
            for name, info in infos.items():
                if name.startswith(below):
                    found[name] = archive.read(info)
    except ModelError:
        raise
    except Exception as error:  # whatever the broken bytes lead to
        if "CRC" in str(error):
            raise ModelError(f"{path} is damaged: {name} does not have the checksum it was stored with") from error
        raise ModelError(f"{path} is damaged or cut short: {_line(error)}") from error
    return found


def _checked_members(archive: zipfile.ZipFile, size: int, what: str) -> dict[str, zipfile.ZipInfo]:
    infos = [info for info in archive.infolist() if not info.is_dir()]
    for info in infos:
        parts = info.filename.split("/")
        if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
            raise ModelError(f"{what} has a member {info.filename!r}, whose name is no plain path")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise ModelError(
                f"{what} has a member {info.filename} that is compressed or encrypted; torch.export.save does neither"
            )
    declared = sum(info.file_size for info in infos)
    if declared > size:
        raise ModelError(f"{what} says that its members have {declared} bytes, more than the file's {size}")
    found = {info.filename.partition("/")[2]: info for info in infos}
    if len(found) < len(infos):
        raise ModelError(f"{what} has several members of one name")
    return found


# ---- the program


def _program(members: Mapping[str, bytes]) -> torch.export.ExportedProgram:
    if _PROGRAM not in members:
        raise ModelError(f"it has no {_PROGRAM}; torch.export.save of torch 2.8 or newer writes one")
    _check_samples(members.get(_SAMPLES, b""))
    given = json.loads(members[_PROGRAM])
    fields = _checked(schema.ExportedProgram, given, "the program")
    program = _dict_to_dataclass(schema.ExportedProgram, fields)  # type: ignore[no-untyped-call]
    state, constants = (_tensors(kind, members) for kind in _KINDS)
    return ExportedProgramDeserializer().deserialize(program, state, constants, None)


def _check_samples(data: bytes) -> None:
    """Example inputs are not needed; those that are no tensors say that the file is not what it seems."""
    if data:
        try:
            _unpickled(data)
        except Exception as error:
            raise Refused(f"its example inputs are not tensors alone ({_line(error)})") from error


def _unpickled(data: bytes) -> Any:
    """What torch.save wrote, where it is tensors in plain containers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _checked_members(archive, len(data), "a member")
    return torch.load(io.BytesIO(data), weights_only=True)


# ---- tensors


def _tensors(kind: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    folder = f"data/{kind}/"
    older, config = f"{folder}model.pt", f"{folder}model_{kind}_config.json"
    if older in members:  # as torch before 2.9 wrote them
        return _older_tensors(members[older], older)
    if config not in members:
        raise ModelError(f"it has no {config}")
    entries = _checked(schema.PayloadConfig, json.loads(members[config]), config)["config"]
    storages: dict[str, Tensor] = {}  # by member: tensors that shared one share one again
    limit = sum(map(len, members.values()))
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        place, meta = folder + entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or meta is None:
            raise Refused(f"{name} is stored as a pickle")
        if place not in members:
            raise ModelError(f"it has no {place}, which {name} is stored in")
        tensor = _tensor(members[place], meta, storages, place, limit)
        wanted = meta["requires_grad"] and tensor.is_floating_point()
        found[name] = torch.nn.Parameter(tensor, requires_grad=wanted) if entry["is_param"] else tensor
    return found


def _older_tensors(data: bytes, place: str) -> dict[str, Any]:
    try:
        found = _unpickled(data) if data else {}
    except Exception as error:
        raise Refused(f"{place} is not tensors alone ({_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Refused(f"{place} is not tensors alone")
    return {texts.dotted(name, place): value for name, value in found.items()}


def _tensor(data: bytes, meta: dict[str, Any], storages: dict[str, Tensor], place: str, limit: int) -> Tensor:
    """A tensor as torch stores it: the bytes of its storage, and how it lies in them."""
    dtype = deserialize_scalar_type(meta["dtype"])
    sizes, strides = ([_constant(one, place) for one in meta[what]] for what in ("sizes", "strides"))
    offset = _constant(meta["storage_offset"], place)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    if count and (len(data) % dtype.itemsize or (last + 1) * dtype.itemsize > len(data) or count * dtype.itemsize > limit):
        raise ModelError(f"{place} has {len(data)} bytes, which do not hold {dtype} {sizes} of strides {strides}")
    if place not in storages:
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if data else torch.empty(0, dtype=torch.uint8)
        storages[place] = whole.to(deserialize_device(schema.Device(**meta["device"])))
    return torch.empty(0, dtype=dtype).set_(storages[place].untyped_storage(), offset, sizes, strides)


def _constant(size: dict[str, Any], place: str) -> int:
    value = size.get("as_int")
    if not isinstance(value, int) or value < 0:
        raise ModelError(f"{place} has a tensor whose size or stride is {value}")
    return value


# ---- fields, by torch's own schema


def _checked(kind: Any, value: Any, place: str) -> Any:
    """JSON that has the form of a class of the schema, fields that the class does not have left out."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _checked(arguments[0], value, place)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _checked(arguments[0], value, place)
    if origin is list:
        return [_checked(arguments[0], one, place) for one in _of(list, value, place)]
    if origin is dict:
        return {_key(key, place): _checked(arguments[1], one, f"{place} {key}") for key, one in _of(dict, value, place).items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, _of(dict, value, place), place)
    if isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        return int(kind(_of(int, value, place)))
    if kind is str:
        raise Refused(f"{place} is {texts.shown(str(value))}, and nothing is known of such a text")
    if kind is float:
        return float(_of((int, float, str), value, place))
    return _of(kind, value, place)


def _of(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ModelError(f"{place} is a {type(value).__name__} where something else belongs")
    return value


def _record(kind: Any, value: dict[str, Any], place: str) -> dict[str, Any]:
    if issubclass(kind, _Union) and len(value) != 1:
        raise ModelError(f"{place} has {len(value)} forms, and exactly one is known")
    known = _fields(kind)
    if issubclass(kind, _Union) and next(iter(value)) not in known:
        raise ModelError(f"{place} has the unknown form {next(iter(value))!r}")
    found = {}
    for name in known.keys() & value.keys():
        if (kind, name) in _DROPPED:
            found[name] = _DROPPED[kind, name]
            continue
        check = _TEXTS.get((kind, name))
        where = f"{kind.__name__}.{name}"
        if check is None and value[name] is not None and _holds_text(known[name]):
            check = texts.name
        found[name] = _each(check, value[name], where) if check else _checked(known[name], value[name], where)
    if kind is schema.ExportedProgram and not all(map(texts.SYMBOL.fullmatch, found["range_constraints"])):
        raise Refused("a range is given for what is no symbol")
    return found


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _holds_text(kind: Any) -> bool:
    return kind is str or (typing.get_origin(kind) is not dict and any(map(_holds_text, typing.get_args(kind))))


def _each(check: Callable[[str, str], Any], value: Any, place: str) -> Any:
    """A text, or a list of them, checked."""
    if isinstance(value, list):
        return [_each(check, one, place) for one in value]
    return check(_of(str, value, place), place)


def _key(text: str, place: str) -> str:
    return texts.dotted(_of(str, text, place), f"a key of {place}")


_TEXTS: dict[tuple[type, str], Callable[[str, str], Any]] = {
    (schema.SymExpr, "expr_str"): texts.expression,
    (schema.Node, "target"): texts.operator,
    (schema.Argument, "as_operator"): texts.refused,
    (schema.Argument, "as_string"): texts.free,
    (schema.Argument, "as_strings"): texts.free,
    (schema.ConstantValue, "as_string"): texts.free,
    (schema.CustomObjArgument, "name"): texts.refused,
    (schema.InputToParameterSpec, "parameter_name"): texts.dotted,
    (schema.InputToBufferSpec, "buffer_name"): texts.dotted,
    (schema.InputToTensorConstantSpec, "tensor_constant_name"): texts.dotted,
    (schema.BufferMutationSpec, "buffer_name"): texts.dotted,
    (schema.ParameterMutationSpec, "parameter_name"): texts.dotted,
    (schema.GradientToParameterSpec, "parameter_name"): texts.dotted,
    (schema.ModuleCallEntry, "fqn"): texts.dotted,
    (schema.ModuleCallSignature, "in_spec"): texts.tree,
    (schema.ModuleCallSignature, "out_spec"): texts.tree,
    (schema.ExportedProgram, "torch_version"): texts.free,
    (schema.ExportedProgram, "verifiers"): texts.dialect,
}

# what only tells where something came from, or is code
_DROPPED: dict[tuple[type, str], Any] = {
    (schema.Node, "metadata"): {},
    (schema.GraphModule, "metadata"): {},
    (schema.GraphModule, "treespec_namedtuple_fields"): {},
    (schema.ExportedProgram, "guards_code"): [],
}


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
