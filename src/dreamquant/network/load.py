"""What a user names -> `Network`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamquant.errors import ModelError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, Source
from dreamquant.network.onnx_import import load_onnx
from dreamquant.network.outputs import restated

MEAN_KEY, STD_KEY = "dreamquant.mean", "dreamquant.std"  # properties of a model file
FORMS = "a .onnx file, a .pt2 file, package.module:callable, path.py:callable or timm:NAME"


def load(
    model: str | os.PathLike[str] | nn.Module,
    *,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Network:
    """The network that `model` names: a module, a `.onnx` or `.pt2` file, `package.module:callable` or `path.py:callable`
    (called without arguments, returns a module), or `timm:NAME` (pretrained, needs the extra `timm`).

    `input_shape` is (C, H, W), needed where the model does not tell it. `mean` and `std`, one number a channel, are what pixels
    in 0..1 are normalised with; those stored in a file are used where none are given. `outputs` states kinds of outputs by name
    (`network.outputs.KINDS`); the others' are found. Raises `ModelError` for what cannot be read
    or is no network of images, `OptionError` for options that do not fit.
    """
    if bool(mean) != bool(std):
        raise OptionError("mean and std belong together: give both or none")
    if input_shape is not None and (len(input_shape) != 3 or min(input_shape) < 1):
        raise OptionError(f"input_shape is {input_shape}; it must be (C, H, W), each at least 1")
    network = _load(model, input_shape)
    if mean is None:
        mean, std = stored_normalisation(_properties(network.source))
    _check_normalisation(mean, std or (), network.input_shape[0])
    network = replace(network, mean=mean, std=std or ())
    return replace(network, outputs=restated(network, outputs or {}))


def _load(model: str | os.PathLike[str] | nn.Module, input_shape: tuple[int, int, int] | None) -> Network:
    if isinstance(model, nn.Module):
        return capture(model, input_shape)
    text = os.fspath(model)
    if text.startswith("timm:"):
        return capture(_timm(text.removeprefix("timm:")), input_shape, source=Source("timm", text))
    if text.endswith(".onnx"):
        return load_onnx(Path(text), input_shape=input_shape)
    if text.endswith(".pt2"):
        return capture(_program(Path(text)), input_shape, source=Source("pt2", text, Path(text)))
    if ":" in text:
        return capture(_call(text), input_shape, source=Source("module", text))
    raise ModelError(f"{text} is no model that is known here; give {FORMS}")


def _program(path: Path) -> torch.export.ExportedProgram:
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; a .pt2 file is needed")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is not a torch.export archive (it is no zip file): {_size(path)}")
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} cannot be read by torch {torch.__version__}: {_line(error)}") from error


def _check_archive(path: Path) -> None:
    """torch reads weights without looking at their checksums, so damaged ones would pass."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever the broken bytes lead to
        raise ModelError(f"{path} is damaged or cut short: {_line(error)}") from error
    if damaged is not None:
        raise ModelError(f"{path} is damaged: {damaged} does not have the checksum it was stored with")


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
        with zipfile.ZipFile(source.path) as archive:
            for name in archive.namelist():
                for key in (MEAN_KEY, STD_KEY):
                    if name.endswith(f"extra/{key}"):
                        stored[key] = archive.read(name).decode()
    return stored


def stored_normalisation(properties: Mapping[str, str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from the properties of a model file; empty where they are not among them."""
    return parse_numbers(properties.get(MEAN_KEY, "")), parse_numbers(properties.get(STD_KEY, ""))


def parse_numbers(text: str) -> tuple[float, ...]:
    """`"0.5,0.5"` -> (0.5, 0.5); `OptionError` for anything that is no list of numbers."""
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise OptionError(f"{text!r} is no list of numbers like 0.485,0.456,0.406") from None


def format_numbers(values: Iterable[float]) -> str:
    """(0.5, 0.5) -> `"0.5,0.5"`, from which `parse_numbers` reads the same numbers, to the last bit."""
    return ",".join(repr(value) for value in values)


def _check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise OptionError(
                f"{name} has {len(values)} numbers ({', '.join(map(str, values))}); the network has {channels} channels"
            )
        if not all(math.isfinite(value) for value in values):
            raise OptionError(f"{name} is {', '.join(map(str, values))}; all must be finite")
    if any(value <= 0 for value in std):
        raise OptionError(f"std is {', '.join(map(str, std))}; all must be above 0")


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
