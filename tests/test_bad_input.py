"""Whatever a user can get wrong: one line that says what was given, what is known and why; nothing is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import sys
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import dreamquant
import dreamquant.synthesis.rsd
from dreamquant import Network, Samples
from dreamquant.cli import main
from dreamquant.errors import DataError, DreamQuantError

OLD = b"what was here before"
QUICK = ("--set", "synthesis.count=2", "--set", "synthesis.held_out=2", "--set", "synthesis.steps=1")
FOLDED = "digits_bnfolded.onnx"
ONCE = ("--rounds", "1")


@dataclass(frozen=True)
class Case:
    """Arguments after `command model -o output`, and what the one line must say.

    A model is a file of the folder `bad`, or whatever follows "=". `{bad}` and `{out}` stand for the two folders.
    """

    model: str
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    output: str = ""


def small(x: list[Any], *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, opset: int = 17) -> onnx.ModelProto:
    """A network of one 3x3 convolution from 3 to 4 channels, with `nodes` behind it (from `c` to `y`)."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    convolution = helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        [convolution, *(nodes or [helper.make_node("Relu", ["c"], ["y"])])],
        "small",
        [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def two_inputs() -> onnx.ModelProto:
    proto = small(["n", 3, 8, 8], helper.make_node("Add", ["c", "z"], ["y"]))
    proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4, 8, 8]))
    return proto


def vectors() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "vectors",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def png_of(width: int, height: int) -> bytes:
    """A grey PNG that says it has so many pixels, and has none."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    told = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def with_weight(source: Path, value: float) -> bytes:
    """The ONNX file with one value of its largest tensor replaced."""
    proto = onnx.load(source)
    tensor = max(proto.graph.initializer, key=lambda tensor: tensor.ByteSize())
    array = numpy_helper.to_array(tensor).copy()
    array.flat[7] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto.SerializeToString()


def quantized() -> onnx.ModelProto:
    constants = [
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    proto = small(
        ["n", 3, 8, 8],
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    )
    proto.graph.initializer.extend(constants)
    return proto


def growing(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """`small` with nodes (from `c` to `y`) and the constants that they read."""
    proto = small(["n", 3, 8, 8], *nodes)
    proto.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    return proto


def calling(*functions: list[str]) -> onnx.ModelProto:
    """`small` with functions F0, F1, ..., each of which calls those of these names, one behind the other."""
    proto = small(["n", 3, 8, 8], helper.make_node("F0", ["c"], ["y"], domain="f"))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    for number, names in enumerate(functions):
        values = ["i", *(f"v{place}" for place in range(len(names) - 1)), "o"]
        nodes = [
            helper.make_node(name, [values[place]], [values[place + 1]], domain="f" if name.startswith("F") else "")
            for place, name in enumerate(names)
        ]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        proto.functions.append(helper.make_function("f", f"F{number}", ["i"], ["o"], nodes, imports))
    return proto


def damaged_archive(source: Path) -> bytes:
    """The zip file with the bytes of its largest member overwritten."""
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(source.read_bytes())
    start = largest.header_offset + 200
    data[start : start + 400] = bytes(400)
    return bytes(data)


NAN_MODULE = """
import torch
from torch import nn

def broken():
    layer = nn.Conv2d(3, 4, 3)
    nn.init.constant_(layer.weight, float("nan"))
    return layer

def number():
    return 3

def fails():
    raise RuntimeError("no weights\\nat all")

text = "no function"
"""

RECIPES = {
    "broken.toml": "[synthesis\nmethod = ",
    "unknown_key.toml": 'summary = "x"\nsynthesys = 1\n[synthesis]\nmethod = "noise"\n',
    "no_synthesis.toml": 'summary = "x"\n',
    "unknown_method.toml": 'summary = "x"\n[synthesis]\nmethod = "telepathy"\n',
    "unknown_option.toml": 'summary = "x"\n[synthesis]\nmethod = "noise"\nstepz = 3\n',
    "bad_count.toml": 'summary = "x"\n[synthesis]\nmethod = "noise"\ncount = "many"\n',
    "deep.toml": 'summary = "x"\nx = ' + "[" * 50000 + "]" * 50000,
    "long.toml": f'summary = "x"\nx = {"9" * 5000}',
    "plan_key.toml": 'summary = "a plan"\nplacemant = "integer"\n',
}


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder with one file for each thing that can be wrong with a model or a recipe."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("digits.pt2", FOLDED, "digits_test.npz"):
        shutil.copy(digits / name, folder / name)
    for kind, name in (("onnx", FOLDED), ("pt2", "digits.pt2")):
        whole = (digits / name).read_bytes()
        (folder / f"empty.{kind}").touch()
        (folder / f"truncated.{kind}").write_bytes(whole[: len(whole) // 2])
        (folder / f"text.{kind}").write_text("a text file, and no network\n" * 20)
        (folder / f"random.{kind}").write_bytes(np.random.default_rng(0).bytes(4096))
        (folder / f"folder.{kind}").mkdir()
    (folder / "damaged.pt2").write_bytes(damaged_archive(digits / "digits.pt2"))
    for name, proto in {
        "vectors": vectors(),
        "integers": small(["n", 3, 8, 8], kind=TensorProto.INT64),
        "two_inputs": two_inputs(),
        "dynamic": small(["n", 3, "h", "w"]),
        "batches": small([4, 3, 8, 8]),
        "old": small(["n", 3, 8, 8], opset=6),
        "unknown": small(["n", 3, 8, 8], helper.make_node("Frobnicate", ["c"], ["y"], name="frob")),
        "foreign": small(["n", 3, 8, 8], helper.make_node("Thing", ["c"], ["y"], name="thing", domain="com.x")),
        "quantized": quantized(),
        "plain": small(["n", 3, 8, 8]),
        "pooled": small(["n", 3, 8, 8], helper.make_node("ReduceMax", ["c"], ["y"], axes=[2, 3], keepdims=0)),
    }.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    tall, ratios = np.array([1, 4, 2**20, 2**20]), np.array([1, 1, 2**17, 2**17], np.float32)
    for name, proto in {
        "resized": growing(helper.make_node("Resize", ["c", "", "r"], ["y"], mode="nearest"), r=ratios),
        "padded": growing(helper.make_node("Pad", ["c", "s"], ["y"]), s=np.array([0, 0, 2**20, 2**20, 0, 0, 0, 0])),
        "tiled": growing(helper.make_node("Tile", ["c", "s"], ["y"]), s=tall),
        "filled": growing(helper.make_node("ConstantOfShape", ["s"], ["e"]), helper.make_node("Add", ["c", "e"], ["y"]), s=tall),
        "product": growing(
            helper.make_node("MatMul", ["a", "b"], ["e"]),
            helper.make_node("ReduceMax", ["e"], ["g"], keepdims=0),
            helper.make_node("Add", ["c", "g"], ["y"]),
            a=np.ones((2**20, 1), np.float32),
            b=np.ones((1, 2**20), np.float32),
        ),
        "huge": small(["n", 3, 2**40, 2**40]),
        "no_value": growing(helper.make_node("Constant", [], ["e"]), helper.make_node("Add", ["c", "e"], ["y"])),
        "odd_type": small(["n", 3, 8, 8], kind=29),
        "itself": calling(["F0"]),
        "doubling": calling(*(["F" + str(level)] * 2 for level in range(1, 50)), ["Relu"]),
    }.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    (folder / "no_text.onnx").write_bytes(small(["n", 3, 8, 8]).SerializeToString().replace(b"conv", b"\xff\xfe\x80c"))
    (folder / "nan.onnx").write_bytes(with_weight(digits / FOLDED, np.nan))
    (folder / "inf.onnx").write_bytes(with_weight(digits / FOLDED, np.inf))
    (folder / "nets.py").write_text(NAN_MODULE)
    (folder / "syntax.py").write_text("def broken(:\n")
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    (folder / "binary.toml").write_bytes(bytes([0xFF, 0xFE, 0x80]))
    (folder / "labels.csv").write_text("file,class\na.png,1\n")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY")
    bomb = bytearray((folder / "bomb.npz").read_bytes())
    entry = bomb.rfind(b"PK\x01\x02")
    bomb[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")  # what the directory says of its size
    (folder / "bomb.npz").write_bytes(bomb)
    np.save(folder / "array.npy", np.zeros(3))
    (folder / "array.npy").rename(folder / "array.npz")
    (folder / "pictures" / "0").mkdir(parents=True)
    (folder / "pictures" / "0" / "a.png").write_bytes(png_of(10000, 12000))
    (folder / "boxes.json").write_text('{"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}], "categories": []}')
    np.savez(folder / "numbers.npz", x=np.zeros((2, 16, 16), np.uint8), y=np.zeros((2, 3)))
    (folder / "here.csv").write_text("file,label\n/etc/passwd,0\n../labels.csv,0\n")
    np.savez(folder / "empty.npz", x=np.zeros((0, 16, 16), np.uint8), y=np.zeros(0, np.int64))
    np.savez(folder / "samples.npz", images=np.zeros((2, 1, 2, 2), np.float32))
    np.savez(folder / "many.npz", x=np.zeros((2, 16, 16), np.uint8), y=np.array([3, 99]))
    return folder


MODELS = {
    "missing onnx": Case("nothing.onnx", ("nothing.onnx", "no such file")),
    "missing pt2": Case("nothing.pt2", ("nothing.pt2", "no file")),
    "empty onnx": Case("empty.onnx", ("empty.onnx", "is empty")),
    "empty pt2": Case("empty.pt2", ("empty.pt2", "0 bytes")),
    "truncated onnx": Case("truncated.onnx", ("truncated.onnx", "cut short")),
    "truncated pt2": Case("truncated.pt2", ("truncated.pt2", "no zip")),
    "text as onnx": Case("text.onnx", ("text.onnx", "not an ONNX file")),
    "text as pt2": Case("text.pt2", ("text.pt2", "no zip")),
    "random onnx": Case("random.onnx", ("random.onnx", "not an ONNX file")),
    "random pt2": Case("random.pt2", ("random.pt2", "no zip")),
    "damaged pt2": Case("damaged.pt2", ("damaged.pt2 is damaged", "checksum")),
    "folder onnx": Case("folder.onnx", ("folder.onnx", "folder")),
    "folder pt2": Case("folder.pt2", ("folder.pt2 is a folder",)),
    "vectors": Case("vectors.onnx", ("'x' float32 (n, 3)", "images (N, C, H, W)")),
    "integers": Case("integers.onnx", ("'x' int64 (n, 3, 8, 8)", "float32")),
    "two inputs": Case("two_inputs.onnx", ("'x'", "'z'", "one input of images")),
    "dynamic shape": Case("dynamic.onnx", ("(n, 3, h, w)", "--input-shape C,H,W")),
    "old opset": Case("old.onnx", ("opset 6", "7")),
    "unknown operator": Case("unknown.onnx", ("Frobnicate", "not supported", "'frob'")),
    "foreign operator": Case("foreign.onnx", ("Thing", "com.x", "'thing'")),
    "quantized already": Case("quantized.onnx", ("already quantized", "'quantize'")),
    "NaN weights": Case("nan.onnx", ("1 values that are NaN or infinite",)),
    "infinite weights": Case("inf.onnx", ("1 values that are NaN or infinite",)),
    "NaN module": Case("nets.py:broken", ("108 of 108 values", "weight", "NaN"), ("--input-shape", "3,8,8")),
    "module without shape": Case("nets.py:broken", ("size of its images", "--input-shape")),
    "no function": Case("nets.py:nothing", ("no callable 'nothing'", "broken, fails", "number")),
    "not callable": Case("nets.py:text", ("no callable 'text'",)),
    "no module": Case("nets.py:number", ("returned a int", "Module"), ("--input-shape", "3,8,8")),
    "function fails": Case("nets.py:fails", ("RuntimeError", "no weights")),
    "missing python file": Case("none.py:f", ("there is no file", "none.py")),
    "python file with an error": Case("syntax.py:f", ("SyntaxError",)),
    "missing module": Case("=no_such_package.nets:f", ("'no_such_package.nets'", "ModuleNotFoundError")),
    "unknown form": Case("=model.h5", ("model.h5", ".onnx", ".pt2", "timm:NAME")),
    "no timm": Case("=timm:resnet18", ("timm:resnet18", "dreamquant[timm]")),
    "shape against the file": Case(FOLDED, ("(batch, 1, 16, 16)", "1,8,8"), ("--input-shape", "1,8,8")),
    "shape against the program": Case("digits.pt2", ("(1, 16, 16)", "(1, 8, 8)"), ("--input-shape", "1,8,8")),
    "a resize to terabytes": Case("resized.onnx", ("49,152 GiB", "the limit is", "--memory")),
    "a border of terabytes": Case("padded.onnx", ("GiB of memory would be needed",)),
    "tiles of terabytes": Case("tiled.onnx", ("GiB of memory would be needed",)),
    "a constant of terabytes": Case("filled.onnx", ("ConstantOfShape", "GiB of memory would be needed")),
    "a constant product of terabytes": Case("product.onnx", ("MatMul", "GiB of memory would be needed")),
    "images of yottabytes": Case("huge.onnx", ("images (2, 3, 1099511627776, 1099511627776)", "more than 10^9 GiB")),
    "little memory": Case(FOLDED, ("the limit is 0.0001 GiB", "--memory"), ("--memory", "0.0001")),
    "no memory": Case(FOLDED, ("memory is 0", "GiB above 0"), ("--memory", "0")),
    "constant of nothing": Case("no_value.onnx", ("no_value.onnx",)),
    "unknown type": Case("odd_type.onnx", ("unknown type 29", "float32")),
    "a function of itself": Case("itself.onnx", ("function 'F0' calls itself",)),
    "functions without end": Case("doubling.onnx", ("written out", "1,000,000")),
    "a name that is no text": Case("no_text.onnx", ("no text (UTF-8)",)),
    "a name to obey": Case("=\x1b[31m.onnx", (r"\x1b[31m.onnx", "no such file")),
    "a name of surrogates": Case("=\udcff.onnx", (r"\udcff.onnx", "no such file")),
    "wrong channels": Case("dynamic.onnx", ("(n, 3, h, w)", "1,8,8"), ("--input-shape", "1,8,8")),
}

OPTIONS = {
    "unknown recipe": Case(FOLDED, ("unknown recipe 'aoto'", "did you mean 'auto'?", "zeroq"), ("--recipe", "aoto")),
    "missing recipe file": Case(FOLDED, ("nowhere.toml cannot be read: No such file",), ("--recipe", "nowhere.toml")),
    "broken recipe": Case(FOLDED, ("broken.toml", "not TOML"), ("--recipe", "{bad}/broken.toml")),
    "unknown key": Case(FOLDED, ("'synthesys'", "did you mean 'synthesis'?"), ("--recipe", "{bad}/unknown_key.toml")),
    "recipe without synthesis": Case(
        FOLDED, ("no_synthesis.toml: synthesis is missing",), ("--recipe", "{bad}/no_synthesis.toml")
    ),
    "recipe's method": Case(FOLDED, ("'telepathy'", "fractal, gdfq"), ("--recipe", "{bad}/unknown_method.toml")),
    "recipe's option": Case(FOLDED, ("'stepz'", "noise"), ("--recipe", "{bad}/unknown_option.toml")),
    "binary recipe": Case(FOLDED, ("it is no text",), ("--recipe", "{bad}/binary.toml")),
    "deep recipe": Case(FOLDED, ("deep.toml", "nested too deeply"), ("--recipe", "{bad}/deep.toml")),
    "recipe of a long number": Case(FOLDED, ("long.toml", "4300 digits"), ("--recipe", "{bad}/long.toml")),
    "images without end": Case(FOLDED, ("1e+12", "at most 1,000,000,000"), ("--set", "synthesis.count=1000000000000")),
    "steps without end": Case("digits.pt2", ("1e+12", "at most 1,000,000,000"), ("--set", "synthesis.steps=1000000000000")),
    "images of terabytes": Case(FOLDED, ("900000000 images", "--memory"), ("--set", "synthesis.count=900000000")),
    "recipe's count": Case(FOLDED, ("count", "'many'"), ("--recipe", "{bad}/bad_count.toml")),
    "unknown plan": Case(FOLDED, ("unknown plan 'deplyo'", "did you mean 'deploy'?", "brecq"), ("--plan", "deplyo")),
    "plan's key": Case(FOLDED, ("'placemant'", "did you mean 'placement'?"), ("--plan", "{bad}/plan_key.toml")),
    "unknown budget": Case(FOLDED, ("unknown budget 'huge'", "paper, quick, standard"), ("--budget", "huge")),
    "unknown stage": Case(
        FOLDED, ("unknown stage 'dreams'", "quantization, reconstruction, synthesis, training"), ("--set", "dreams.steps=3")
    ),
    "training without a method": Case(FOLDED, ("training.method",), ("--set", "training.batch=3")),
    "unknown training": Case(FOLDED, ("'gdfk'", "did you mean 'gdfq'?"), ("--set", "training.method=gdfk")),
    "unknown option": Case("digits.pt2", ("'stepz'", "did you mean 'steps'?"), ("--set", "synthesis.stepz=3")),
    "unknown method": Case(FOLDED, ("'zeroqq'", "did you mean 'zeroq'?"), ("--set", "synthesis.method=zeroqq")),
    "unknown plan field": Case(FOLDED, ("'mirror'", "placement"), ("--set", "quantization.mirror=1")),
    "unknown ranges": Case(FOLDED, ("'guess'", "minmax"), ("--set", "quantization.activation_ranges=guess")),
    "unknown ranges option": Case(
        FOLDED,
        ("'percnt'",),
        ("--set", "quantization.activation_ranges=percentile", "--set", "quantization.activation_options.percnt=9"),
    ),
    "impossible percentile": Case(
        FOLDED,
        ("percent is 20", "above 50"),
        (
            "--set",
            "quantization.activation_ranges=percentile",
            "--set",
            "quantization.activation_options.percent=20",
            *QUICK[:4],
        ),
    ),
    "text for a number": Case("digits.pt2", ("steps", "'many'", "whole number"), ("--set", "synthesis.steps=many")),
    "no setting": Case(FOLDED, ("'steps'", "stage.option=value"), ("--set", "steps")),
    "no stage": Case(FOLDED, ("'steps=3'", "stage.option=value"), ("--set", "steps=3")),
    "text for a plan field": Case(FOLDED, ("weight_symmetric", "'maybe'"), ("--set", "quantization.weight_symmetric=maybe")),
    "table for an option": Case("digits.pt2", ("steps",), ("--set", "synthesis.steps.deep=3")),
    "too many bits": Case(FOLDED, ("'W9A4'", "2 to 8"), ("--bits", "W9A4")),
    "no bits": Case(FOLDED, ("'banana'", "W8A8"), ("--bits", "banana")),
    "half the bits": Case(FOLDED, ("'W8'", "W8A8"), ("--bits", "W8")),
    "bits for no layer": Case(FOLDED, ("'8'", "NAME=8"), ("--bits-for", "8")),
    "bits for a layer of no number": Case(FOLDED, ("'many'",), ("--bits-for", "conv2d=many")),
    "too many bits for a layer": Case(FOLDED, ("'W9A9'", "2 to 8"), ("--bits-for", "conv2d=9")),
    "bits for an unknown layer": Case(FOLDED, ("'conv_1'", "did you mean 'conv2d_1'"), ("--bits-for", "conv_1=8")),
    "an unknown layer to keep": Case(FOLDED, ("'lineer'", "did you mean 'linear'"), ("--keep-float", "lineer")),
    "impossible agreement": Case(FOLDED, ("101", "agreement"), ("--agreement", "101")),
    "one bit": Case(FOLDED, ("'W1A8'", "2 to 8"), ("--bits", "W1A8")),
    "no number in the shape": Case(FOLDED, ("'3,x,32'", "3,224,224"), ("--input-shape", "3,x,32")),
    "short shape": Case(FOLDED, ("'3,32'", "C,H,W"), ("--input-shape", "3,32")),
    "zero shape": Case(FOLDED, ("'3,0,32'", "above 0"), ("--input-shape", "3,0,32")),
    "superscript shape": Case(FOLDED, ("'3,2²,32'", "C,H,W"), ("--input-shape", "3,2²,32")),
    "long mean": Case(FOLDED, ("mean has 3 numbers", "1 channel"), ("--mean", "0.1,0.2,0.3", "--std", "1")),
    "long std": Case(FOLDED, ("std has 2 numbers", "1 channel"), ("--mean", "0.1", "--std", "1,1")),
    "mean alone": Case(FOLDED, ("mean and std",), ("--mean", "0.1")),
    "std alone": Case(FOLDED, ("mean and std",), ("--std", "0.1")),
    "mean of words": Case(FOLDED, ("'a,b'", "0.485,0.456,0.406"), ("--mean", "a,b", "--std", "1,1")),
    "empty mean": Case(FOLDED, ("mean and std belong together",), ("--mean", "", "--std", "1")),
    "mean NaN": Case(FOLDED, ("mean is nan", "finite"), ("--mean", "nan", "--std", "1")),
    "std zero": Case(FOLDED, ("std is 0", "above 0"), ("--mean", "0", "--std", "0")),
    "no images": Case(FOLDED, ("count is 0", "at least one"), ("--set", "synthesis.count=0")),
    "no held-out images": Case(FOLDED, ("held_out is 0", "at least one"), ("--set", "synthesis.held_out=0")),
    "no steps": Case("digits.pt2", ("steps is 0",), ("--set", "synthesis.steps=0")),
    "negative steps": Case("digits.pt2", ("steps is -3",), ("--set", "synthesis.steps=-3")),
    "no BatchNorm": Case(FOLDED, ("'zeroq'", "BatchNorm", "fractal, noise"), ("--recipe", "zeroq")),
    "loss not finite": Case(
        "digits.pt2",
        ("loss became", "learning_rate"),
        (*QUICK[:4], "--set", "synthesis.steps=9", "--set", "synthesis.learning_rate=1e30"),
    ),
    "negative seed": Case(FOLDED, ("seed is -5", "from 0 to"), ("--seed", "-5")),
    "seed too large": Case(FOLDED, ("seed", "18446744073709551616"), ("--seed", "18446744073709551616")),
}

OUTPUTS = {
    "no folder": Case(FOLDED, ("nowhere", "does not exist"), output="nowhere/out.onnx"),
    "folder as output": Case(FOLDED, ("it is a folder",), output="sub.onnx"),
    "input as output": Case(FOLDED, ("it is the input",), output=f"{{bad}}/{FOLDED}"),
    "input through a link": Case(FOLDED, ("it is the input",), output="link.onnx"),
    "input through a hard link": Case(FOLDED, ("it is the input",), output="hard.onnx"),
    "a full device": Case(FOLDED, ("/dev/full",), output="/dev/full"),
    "wrong suffix": Case(FOLDED, ("out.tflite", "known: .onnx"), output="out.tflite"),
    "no suffix": Case(FOLDED, ("known: .onnx",), output="out"),
    "file as folder": Case(FOLDED, ("not a folder",), output="out.onnx/out.onnx"),
    "wrong suffix of a report": Case(FOLDED, ("out.htm", "must be .html"), ("--report", "{out}/out.htm")),
    "report into no folder": Case(FOLDED, ("nowhere", "does not exist"), ("--report", "{out}/nowhere/out.html")),
    "run folder is a file": Case(FOLDED, ("file.txt", "folder"), ("--run-dir", "{out}/file.txt", *QUICK[:4])),
}

SYNTHESIZE = {
    "wrong suffix for samples": Case(FOLDED, ("out.onnx", ".safetensors, .npz, .png"), output="out.onnx"),
    "unknown synthesis method": Case(FOLDED, ("'zerocue'", "did you mean 'zeroq'?"), ("--method", "zerocue")),
    "unknown synthesis option": Case(FOLDED, ("'stepz'", "did you mean 'steps'?"), ("--set", "stepz=3")),
    "no synthesis setting": Case(FOLDED, ("'steps'", "name=value"), ("--set", "steps")),
    "text for steps": Case(FOLDED, ("'many'", "whole number"), ("--set", "steps=many")),
    "unknown class loss": Case("digits.pt2", ("'mae'", "ce, mse_softmax"), ("-n", "2", "--set", "class_loss=mae")),
    "count 0": Case(FOLDED, ("count is 0", "at least one"), ("-n", "0")),
    "count -2": Case(FOLDED, ("count is -2", "at least one"), ("-n", "-2")),
    "zeroq without BatchNorm": Case(FOLDED, ("'zeroq'", "BatchNorm", "fractal, noise"), ("--method", "zeroq")),
    "psaq without attention": Case(FOLDED, ("'psaq'", "attention", "fractal, noise"), ("--method", "psaq")),
    "no leaves": Case(FOLDED, ("leaves is -1",), ("--method", "fractal", "-n", "2", "--set", "leaves=-1")),
    "no pixels to write": Case("dynamic.onnx", ("mean and std", "give both"), ("--input-shape", "3,8,8"), output="dreams"),
    "folder of other things": Case(FOLDED, ("holds some.txt", "would be lost"), output="kept"),
    "folder into no folder": Case(FOLDED, ("does not exist",), output="nowhere/dreams"),
    "file where a folder goes": Case(FOLDED, ("it is a file",), output="plain"),
    "unknown tool": Case(FOLDED, ("unknown tool 'modelop'", "did you mean 'modelopt'?"), ("--for", "modelop")),
    "tool without a name": Case("digits.pt2", ("no .onnx file", "--input-name"), ("--for", "modelopt")),
    "tool and another format": Case(FOLDED, ("out.png", ".npz only"), ("--for", "modelopt"), output="out.png"),
    "name and another format": Case(FOLDED, ("out.png", ".npz only"), ("--input-name", "x"), output="out.png"),
    "part of a batch": Case("batches.onnx", ("batches of 4", "6 images"), ("--for", "modelopt", "-n", "6")),
    "synthesis into no folder": Case(FOLDED, ("does not exist",), output="nowhere/out.npz"),
}

EVALUATE = {
    "no data": Case(FOLDED, ("none.npz", "does not exist"), ("none.npz",)),
    "unknown kind of data": Case(FOLDED, ("labels.csv", "a folder, .npz, .zip"), ("{bad}/labels.csv",)),
    "a bomb of arrays": Case(FOLDED, ("bomb.npz", "4 GiB", "--memory"), ("{bad}/bomb.npz", "--memory", "1")),
    "an image of gigapixels": Case(FOLDED, ("a.png", "120,000,000 pixels", "10000 x 12000"), ("{bad}/pictures",)),
    "labels that lead elsewhere": Case(
        FOLDED, ("2 of the 2 images", "here.csv", "/etc/passwd"), ("{bad}/pictures", "--labels", "{bad}/here.csv")
    ),
    "functions without end to evaluate": Case("doubling.onnx", ("written out",), ("{bad}/digits_test.npz",)),
    "labels of nothing that is told": Case(FOLDED, ("labels are numbers", "no output of values"), ("{bad}/numbers.npz",)),
    "a blank of no sequence": Case(FOLDED, ("blank", "logits is classes"), ("{bad}/digits_test.npz", "--blank", "0")),
    "boxes of no image": Case(FOLDED, ("boxes.json", "COCO", "KeyError"), ("{bad}/pictures", "--labels", "{bad}/boxes.json")),
    "images without masks": Case(FOLDED, ("images have no mask", "a.png"), ("{bad}/pictures", "--labels", "{bad}")),
    "labels missing": Case(FOLDED, ("none.csv",), ("{bad}", "--labels", "none.csv")),
    "labels without column": Case(FOLDED, ("labels.csv", "label", "class"), ("{bad}", "--labels", "{bad}/labels.csv")),
    "no normalisation": Case(
        "dynamic.onnx", ("dynamic.onnx", "--mean and --std"), ("{bad}/digits_test.npz", "--input-shape", "3,8,8")
    ),
    "mean without std": Case(
        "dynamic.onnx",
        ("mean and std belong together",),
        ("{bad}/digits_test.npz", "--input-shape", "3,8,8", "--mean", "0,0,0"),
    ),
    "no size": Case("dynamic.onnx", ("--input-shape",), ("{bad}/digits_test.npz", "--mean", "0,0,0", "--std", "1,1,1")),
    "no images to evaluate": Case(FOLDED, ("empty.npz",), ("{bad}/empty.npz",)),
    "labels beyond the outputs": Case(FOLDED, ("99", "10 outputs"), ("{bad}/many.npz",)),
    "a name of any length": Case("a" * 300 + ".onnx", ("aaa.onnx", "File name too long"), ("{bad}/digits_test.npz",)),
    "missing model to evaluate": Case("nothing.onnx", ("nothing.onnx", "no"), ("{bad}/digits_test.npz",)),
    "text to evaluate": Case("text.onnx", ("text.onnx",), ("{bad}/digits_test.npz",)),
    "batch 0": Case(FOLDED, ("batch", "at least 1"), ("{bad}/digits_test.npz", "--batch", "0")),
}

INSPECT = {
    "missing model to inspect": Case("nothing.pt2", ("nothing.pt2",)),
    "unknown plan to inspect": Case(FOLDED, ("unknown plan", "deploy"), ("--plan", "depoly")),
    "impossible bits to inspect": Case(FOLDED, ("'W99A1'", "2 to 8"), ("--bits", "W99A1")),
}

OTHER = "{bad}/quantized.onnx"  # images (3, 8, 8)
SAME = f"{{bad}}/{FOLDED}"

COMPARE = {
    "missing A": Case("nothing.onnx", ("there is no file", "nothing.onnx"), (SAME,)),
    "missing B": Case(FOLDED, ("there is no file", "nothing.onnx"), ("{bad}/nothing.onnx",)),
    "text to compare": Case(FOLDED, ("cannot load", "text.onnx"), ("{bad}/text.onnx",)),
    "no ONNX to compare": Case(FOLDED, ("cannot load", "digits.pt2"), ("{bad}/digits.pt2",)),
    "vectors to compare": Case(FOLDED, ("vectors.onnx takes x", "images (N, C, H, W)"), ("{bad}/vectors.onnx",)),
    "images that do not fit": Case(
        FOLDED, (f"{FOLDED} takes images (1, 16, 16)", "quantized.onnx (3, 8, 8)", "cannot be compared"), (OTHER,)
    ),
    "outputs that do not fit": Case("plain.onnx", ("gives y (n, 4, 8, 8)", "gives y (n, 4)"), ("{bad}/pooled.onnx",)),
    "outputs of NaN": Case(FOLDED, ("values that", "nan.onnx gives as logits are NaN"), ("{bad}/nan.onnx", "-n", "2", *ONCE)),
    "no size to compare": Case("dynamic.onnx", ("leave the size", "--input-shape C,H,W"), ("{bad}/dynamic.onnx",)),
    "no samples": Case(FOLDED, ("there is no file none.npz",), (SAME, "--samples", "none.npz")),
    "an array as samples": Case(FOLDED, ("array.npz", "not a readable"), (SAME, "--samples", "{bad}/array.npz")),
    "samples of another size": Case(
        "quantized.onnx", ("the samples are (1, 2, 2)", "take images (3, 8, 8)"), (OTHER, "--samples", "{bad}/samples.npz")
    ),
    "no data to compare on": Case(FOLDED, ("none.npz", "does not exist"), (SAME, "--data", "none.npz")),
    "a folder without images": Case(FOLDED, ("folder.onnx", "no sub-folders"), (SAME, "--data", "{bad}/folder.onnx")),
    "labels of nothing": Case(FOLDED, ("labels.csv", "give --data"), (SAME, "--labels", "{bad}/labels.csv")),
    "labels beyond what is compared": Case(FOLDED, ("99", "10 outputs"), (SAME, "--data", "{bad}/many.npz", *ONCE)),
    "no normalisation to compare with": Case(
        "quantized.onnx", ("quantized.onnx stores how pixels", "--mean and --std"), (OTHER, "--data", "{bad}/many.npz")
    ),
    "half a normalisation": Case(FOLDED, ("mean and std belong together",), (SAME, "--mean", "0.5")),
    "normalisation of three channels": Case(FOLDED, ("mean has 3", "1 channel"), (SAME, "--mean", "0,0,0", "--std", "1,1,1")),
    "shape against the files": Case(FOLDED, ("(3, 8, 8)", "take images (1, 16, 16)"), (SAME, "--input-shape", "3,8,8")),
    "nothing to compare on": Case(FOLDED, ("count is 0",), (SAME, "-n", "0")),
    "batch of nothing": Case(FOLDED, ("batch is 0", "at least 1"), (SAME, "-n", "2", "--batch", "0")),
    "no rounds": Case(FOLDED, ("rounds is 0", "at least 1"), (SAME, "-n", "2", "--rounds", "0")),
    "more threads than there are numbers": Case(FOLDED, ("threads", "at most 1024"), (SAME, "--threads", str(2**40))),
    "no threads": Case(FOLDED, ("0 threads", "at least 1"), (SAME, "--threads", "0")),
    "batch of others": Case("batches.onnx", ("batches of 4 only, not of 3",), ("{bad}/batches.onnx", "-n", "2", "--batch", "3")),
}


@pytest.fixture
def place(tmp_path: Path, bad: Path) -> Path:
    """A folder to write into, with a result of before."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("out.onnx", "out.npz", "file.txt"):
        (folder / name).write_bytes(OLD)
    (folder / "plain").write_bytes(OLD)
    (folder / "sub.onnx").mkdir()
    (folder / "kept").mkdir()
    (folder / "kept" / "some.txt").write_bytes(OLD)
    (folder / "link.onnx").symlink_to(bad / FOLDED)
    os.link(bad / FOLDED, folder / "hard.onnx") if bad.stat().st_dev == folder.stat().st_dev else None
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


GROUPS = {
    "quantize": {**MODELS, **OPTIONS, **OUTPUTS},
    "synthesize": SYNTHESIZE,
    "evaluate": EVALUATE,
    "inspect": INSPECT,
    "compare": COMPARE,
}
OUTPUT_OF = {"quantize": "out.onnx", "synthesize": "out.npz"}
CASES = [pytest.param(name, case, id=f"{name}: {what}") for name, cases in GROUPS.items() for what, case in cases.items()]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_refused_in_one_line(name: str, case: Case, command: Callable[..., Any], bad: Path, place: Path) -> None:
    def full(text: str) -> str:
        return text.format(bad=bad, out=place)

    model = case.model[1:] if case.model.startswith("=") else f"{bad}/{case.model}"
    output = case.output or OUTPUT_OF.get(name, "")
    written = ["-o", full(output if output.startswith("{") else "{out}/" + output)] if output else []
    before = contents(place), contents(bad)
    with no_warnings():
        finished = command(name, model, *map(full, case.arguments), *written)
    assert finished.status == 2
    assert finished.out == ""
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("dreamquant: ")
    for part in case.says:
        assert part in lines[0]
    assert (contents(place), contents(bad)) == before


@contextmanager
def no_warnings() -> Iterator[None]:
    """Warnings reach the error stream, as they do for a user, so that a test sees them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def test_full_disk(command: Callable[..., Any], bad: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    before = contents(place)
    finished = command("quantize", bad / FOLDED, "-o", place / "out.onnx")
    assert finished.status == 2
    assert finished.err.startswith(f"dreamquant: cannot write {place / 'out.onnx'}: 0.1 MB are needed and 0.0 MB are free")
    assert contents(place) == before


@pytest.mark.parametrize("existing", [True, False])
def test_ctrl_c(
    existing: bool, command: Callable[..., Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dreamquant.synthesis.rsd, "optimize_images", interrupted)
    if existing:
        (tmp_path / "out.onnx").write_bytes(OLD)
    before = contents(tmp_path)
    finished = command("quantize", digits / "digits.pt2", "-o", tmp_path / "out.onnx")
    assert finished.status == 130
    assert finished.err.strip() == "dreamquant: interrupted; nothing was written"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [["quantise"], ["quantize"], ["quantize", "a.onnx"], ["quantize", "a.onnx", "--seed", "x"]])
def test_usage_errors_are_short(arguments: list[str], command: Callable[..., Any]) -> None:
    finished = command(*arguments)
    assert finished.status == 2
    assert finished.out == ""
    assert len(finished.err.splitlines()) == 1


def test_python_api_raises_the_same(bad: Path, place: Path) -> None:
    with pytest.raises(DreamQuantError, match="is empty"):
        dreamquant.run(bad / "empty.onnx", place / "out.onnx")
    assert (place / "out.onnx").read_bytes() == OLD


@pytest.mark.parametrize("arguments", [("methods",), ("recipes", "--json")])
def test_standard_output_is_full(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert_ends(arguments, os.open("/dev/full", os.O_WRONLY), 2, monkeypatch)
    assert capfd.readouterr().err.startswith("dreamquant: the result cannot be written to the standard output: No space")


def test_nobody_reads_the_standard_output(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    read, write = os.pipe()
    os.close(read)
    assert_ends(("recipes", "--json"), write, 0, monkeypatch)
    assert capfd.readouterr().err == ""


def assert_ends(arguments: tuple[str, ...], output: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = os.dup(1)
    monkeypatch.setattr(sys, "argv", ["dreamquant", *arguments])
    with open(output, "w", closefd=True) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            with contextlib.suppress(OSError):
                stream.flush()
    assert end.value.code == status


@pytest.fixture
def network(digits: Path) -> Network:
    return dreamquant.load(digits / FOLDED)


def test_samples_of_numpy() -> None:
    with pytest.raises(DataError, match="ndarray"):
        Samples(np.zeros((2, 1, 16, 16), np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.full((2, 1, 16, 16), torch.nan), "NaN"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.float64), "float64"),
        (torch.zeros(2, 16, 16), "takes .N, 1, 16, 16."),
        (torch.tensor(0.0), "takes .N, 1, 16, 16."),
    ],
)
def test_samples_that_are_none(network: Network, images: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        dreamquant.quantize(network, Samples(images))


def whole(model: Path, path: object) -> bytes:
    network = dreamquant.load(model)
    samples = dreamquant.synthesize(network, np.int64(4), method="noise", seed=np.int64(0))  # type: ignore[arg-type]
    return dreamquant.export(dreamquant.quantize(network, samples), path, samples).path.read_bytes()  # type: ignore[arg-type]


def test_what_a_caller_has_set_in_torch(digits: Path, tmp_path: Path) -> None:
    plain = whole(digits / FOLDED, tmp_path / "plain.onnx")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert whole(digits / FOLDED, str(tmp_path / "set.onnx")) == plain
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_dreaming_where_gradients_are_off(digits: Path) -> None:
    with torch.no_grad():
        samples = dreamquant.synthesize(dreamquant.load(digits / "digits.pt2"), 2, method="rsd", steps=2)
    assert torch.isfinite(samples.images).all()


@pytest.mark.parametrize("model", [FOLDED, "digits.pt2"])
def test_two_threads(model: str, digits: Path, tmp_path: Path) -> None:
    made: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda n=n: made.update({n: whole(digits / model, tmp_path / f"{n}.onnx")})) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1]
