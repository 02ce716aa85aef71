"""What a user names -> `Network`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from dreamquant.devices import AUTO, find_device
from dreamquant.errors import ModelError, OptionError, blamed
from dreamquant.limits import check_memory
from dreamquant.mapped import put_away
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, Source
from dreamquant.network.input_decision import decide
from dreamquant.network.input_space import Statement
from dreamquant.network.onnx_import import load_onnx
from dreamquant.network.outputs import find_outputs, restated
from dreamquant.plain import plain_torch

_ONE_AT_A_TIME = threading.RLock()  # torch.export keeps what it traces in the process, not in the thread
FORMS = "a .onnx file, a .pt2 file, package.module:callable, path.py:callable or timm:NAME"


class Loading(TypedDict, total=False):
    """What `load` takes beside a model, for those who hand it on."""

    input_shape: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    pixels: str | None
    layout: str | None
    channels: str | None
    force: bool
    trust: bool
    outputs: Mapping[str, str] | None
    device: str | torch.device


@plain_torch()
def load(
    model: str | os.PathLike[str] | nn.Module,
    *,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    pixels: str | None = None,
    layout: str | None = None,
    channels: str | None = None,
    force: bool = False,
    trust: bool = False,
    outputs: Mapping[str, str] | None = None,
    device: str | torch.device = AUTO,
) -> Network:
    """The network that `model` names: a module, a `.onnx` or `.pt2` file, `package.module:callable` or `path.py:callable`
    (called without arguments, returns a module), or `timm:NAME` (pretrained, needs the extra `timm`).

    `input_shape` is (C, H, W), needed where the model does not tell it. `mean`, `std`, `pixels`, `layout` and `channels` state
    the input space, as in `network.input_space.Statement`; what is not stated is read from the file, the graph or the first
    BatchNorm, and `Network.space` says which. `outputs` states kinds of outputs by name (`network.outputs.KINDS`); the others'
    are found. It computes on `device`, as `find_device` knows it. Nothing that a file holds is run; a `.pt2` that torch would
    run code from is refused, unless it is one to `trust`.
    Raises `ModelError` for what cannot be read, is no network of images, or contradicts what is stated (`force` goes on),
    `OptionError` for options that do not fit.
    """
    place = find_device(device)
    statement = Statement(mean or None, std or None, pixels, layout, channels)
    if input_shape is not None:
        if len(input_shape) != 3 or not all(size == int(size) >= 1 for size in input_shape):
            raise OptionError(f"input_shape is {input_shape}; it must be (C, H, W), each at least 1")
        input_shape = (int(input_shape[0]), int(input_shape[1]), int(input_shape[2]))
        check_memory(4 * math.prod(input_shape), f"images {input_shape}", OptionError)
    with _ONE_AT_A_TIME, blamed(ModelError, f"{_named(model)} cannot be read"):
        network = _load(model, input_shape, layout, trust)
    put_away()
    with blamed(ModelError, f"{_named(model)} has properties that cannot be read"):
        properties = _properties(network.source)
    looked_at, network = network.input_statistics, decide(network, statement, properties, force=force)
    if not all(torch.equal(*pair) for pair in zip(looked_at, network.input_statistics, strict=True)):
        network = replace(network, outputs=find_outputs(network))  # on images of such numbers
    return replace(network, outputs=restated(network, outputs or {})).to(place)


def _named(model: str | os.PathLike[str] | nn.Module) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)


def _load(
    model: str | os.PathLike[str] | nn.Module, input_shape: tuple[int, int, int] | None, layout: str | None, trust: bool
) -> Network:
    if isinstance(model, nn.Module):
        return capture(model, input_shape, layout=layout)
    text = os.fspath(model)
    if text.startswith("timm:"):
        return capture(_timm(text.removeprefix("timm:")), input_shape, layout=layout, source=Source("timm", text))
    if text.endswith(".onnx"):
        return load_onnx(Path(text), input_shape=input_shape, layout=layout)
    if text.endswith(".pt2"):
        return capture(
            _program(Path(text), trust), input_shape, layout=layout, source=Source("pt2", text, Path(text), trusted=trust)
        )
    if ":" in text:
        return capture(_call(text), input_shape, layout=layout, source=Source("module", text))
    raise ModelError(f"{text} is no model that is known here; give {FORMS}")


def _program(path: Path, trust: bool) -> torch.export.ExportedProgram:
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; a .pt2 file is needed")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is not a torch.export archive (it is no zip file): {_size(path)}")
    from dreamquant.network.archive import read_archive  # here, for it imports torch's compiler, which takes 2 s

    return read_archive(path, trust=trust)


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes"


def _call(text: str) -> nn.Module:
    place, _, name = text.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")))
        raise ModelError(f"{text}: {place} has no callable {name!r} (known: {known or 'none'})")
    try:
        result = function()
    except Exception as error:
        raise ModelError(f"{text}: calling {name}() failed: {type(error).__name__}: {_line(error)}") from error
    if not isinstance(result, nn.Module):
        raise ModelError(f"{text}: {name}() returned a {type(result).__name__}, not a torch.nn.Module")
    return result


def _import_file(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise ModelError(f"{path} cannot be imported: {type(error).__name__}: {_line(error)}") from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(f"module {name!r} cannot be imported: {type(error).__name__}: {_line(error)}") from error


def _timm(name: str) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except Exception as error:
        raise ModelError(
            f"timm:{name} needs timm, which cannot be imported ({_line(error)}): pip install 'dreamquant[timm]'"
        ) from error
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise ModelError(f"timm:{name} cannot be created with its weights: {_line(error)}") from error
    return model


def _properties(source: Source) -> dict[str, str]:
    """The properties of the file that a network was read from, as far as they matter here."""
    stored: dict[str, str] = {}
    if source.proto is not None:
        stored = {entry.key: entry.value for entry in source.proto.metadata_props}
    elif source.kind == "pt2" and source.path is not None:
        from dreamquant.network.archive import extra_files

        stored = extra_files(source.path)
    return stored


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
