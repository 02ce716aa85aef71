"""Files that do not hold or compute what was measured, and whether the proof finds them out.

    python benchmarks/tamper.py [DATA] [--only NAME ...] [--bits W8A8 W4A8]

Each way to spoil a file (`TAMPERS`) at the first, the middle and the last place where it can be applied, in the digits network
of the project and in networks of DATA. `read` is the proof's own verdict; `computed` that of a proof that is kept from reading
stored tensors back, so that it has to see them in what the file computes. One JSON row a file is appended to
benchmarks/results/tamper.jsonl; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import network
from dreamquant.errors import VerificationError
from dreamquant.exporters.packing import packed
from dreamquant.exporters.qdq import OnnxStudent, to_onnx
from dreamquant.exporters.verify import verify
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.synthesis import synthesize

RESULTS = Path(__file__).parent / "results" / "tamper.jsonl"
NETWORKS = ("digits", "resnet20_bnfolded", "mobilenetv1_bnfolded", "squeezenet")
PLACES = ("first", "middle", "last")
IMAGES = 16

Array = NDArray[Any]
Tamper = Callable[[onnx.ModelProto, str], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=Path())
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["W8A8"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name in given.only:
        for bits in given.bits:
            done = {(row["tamper"], row["place"]) for row in rows if (row["network"], row["bits"]) == (name, bits)}
            todo = [pair for pair in pairs() if pair not in done]
            for row in measured(given.data, name, bits, todo) if todo else ():
                rows.append(row)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_table([row for row in rows if row["network"] in given.only and row["bits"] in given.bits])


def pairs() -> list[tuple[str, str]]:
    """Every way to spoil a file, at every place."""
    return [("nothing", "")] + [(name, place) for name in TAMPERS for place in PLACES]


def measured(data: Path, name: str, bits: str, todo: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The proof's verdicts on files of one network."""
    loaded = network(data, name)
    samples = synthesize(loaded, IMAGES, method="fractal", seed=0)
    student = quantize(loaded, samples, bits=bits)
    made = to_onnx(student)
    for tamper, place in todo:
        proto = spoilt(made.proto, tamper, place)
        if proto is None:
            continue
        read = verdict(student, proto, made, samples.images)
        with patch.object(sys.modules[verify.__module__], "read_back", return_value=0):
            computed = verdict(student, proto, made, samples.images)
        row = {"network": name, "bits": bits, "tamper": tamper, "place": place, "read": read, "computed": computed}
        print(
            f"{name} {bits} {tamper} {place}: {'refused' if read else 'passes'}, {'refused' if computed else 'passes'}",
            flush=True,
        )
        yield row


def spoilt(proto: onnx.ModelProto, tamper: str, place: str) -> onnx.ModelProto | None:
    """A copy of the model, spoilt; None where it has nothing that can be spoilt so."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy if tamper == "nothing" or TAMPERS[tamper](copy, place) else None


def verdict(student: Student, proto: onnx.ModelProto, made: OnnxStudent, images: torch.Tensor) -> str:
    """What the proof says against a model; empty where it passes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path)
        try:
            verify(student, path, images, made.integers, made.stored)
        except VerificationError as error:
            return str(error)
    return ""


def print_table(rows: list[dict[str, Any]]) -> None:
    """How many files pass, by network and by what was done to them."""
    print(
        "\n| network | honest files refused | spoilt files | pass | pass where nothing is read back |\n|---|---:|---:|---:|---:|"
    )
    for name, bits in sorted({(row["network"], row["bits"]) for row in rows}):
        own = [row for row in rows if (row["network"], row["bits"]) == (name, bits)]
        honest, bad = [row for row in own if not row["place"]], [row for row in own if row["place"]]
        counts = [sum(not row[how] for row in bad) for how in ("read", "computed")]
        print(f"| {name} {bits} | {sum(bool(row['read']) for row in honest)} | {len(bad)} | {counts[0]} | {counts[1]} |")


# --- ways to spoil a file ---------------------------------------------------------------------------------------------


def _at(items: list[Any], place: str) -> Any:
    return items[{"first": 0, "middle": len(items) // 2, "last": -1}[place]] if items else None


def _tensor(proto: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    return found


def _change(proto: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> bool:
    """Put another value in a stored tensor's place."""
    tensor = _tensor(proto, name)
    before = numpy_helper.to_array(tensor)
    after = change(before.astype(np.float32 if before.dtype == np.float32 else np.int64))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        signed = tensor.data_type == TensorProto.INT4
        limits = (-8, 7) if signed else (0, 15)
        made = packed(torch.from_numpy(after.clip(*limits)), bits=4, signed=signed)
    else:
        if before.dtype != np.float32:
            after = after.clip(np.iinfo(before.dtype).min, np.iinfo(before.dtype).max)
        made = numpy_helper.from_array(after.astype(before.dtype))
    made.name = name
    if made.raw_data == tensor.raw_data:
        return False
    tensor.CopyFrom(made)
    return True


def _stored(proto: onnx.ModelProto, *, bias: bool) -> list[onnx.NodeProto]:
    """The nodes that dequantize weights, or biases, in the order of the layers that read them."""
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = {node.output[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held}
    read = dict.fromkeys(name for node in proto.graph.node for name in node.input if name in nodes)
    return [nodes[name] for name in read if (held[nodes[name].input[0]].data_type == TensorProto.INT32) == bias]


def _activations(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]


def _weight_scale(by: float, *, channel: bool = False) -> Tamper:
    def tamper(proto: onnx.ModelProto, place: str) -> bool:
        node = _at(_stored(proto, bias=False), place)

        def change(scale: Array) -> Array:
            if not channel:
                return scale * by
            changed = scale.copy()
            changed.reshape(-1)[scale.size // 2] *= by
            return changed

        return node is not None and _change(proto, node.input[1], change)

    return tamper


def _bias(proto: onnx.ModelProto, place: str) -> bool:
    node = _at(_stored(proto, bias=True), place)
    return node is not None and _change(proto, node.input[0], lambda bias: np.round(bias * 1.05))


def _weight_zero_point(proto: onnx.ModelProto, place: str) -> bool:
    node = _at(_stored(proto, bias=False), place)
    return node is not None and _change(proto, node.input[2], lambda zero: np.where(zero < 100, zero + 1, zero - 1))


def _one_weight(proto: onnx.ModelProto, place: str) -> bool:
    """One integer of a weight, the largest, goes to 0."""
    node = _at(_stored(proto, bias=False), place)

    def change(weight: Array) -> Array:
        zero = numpy_helper.to_array(_tensor(proto, node.input[2])).reshape(-1)[0]
        flat = weight.reshape(-1).copy()
        flat[np.abs(flat - int(zero)).argmax()] = int(zero)
        return flat.reshape(weight.shape)

    return node is not None and _change(proto, node.input[0], change)


def _swapped_weights(proto: onnx.ModelProto, place: str) -> bool:
    """Two filters of a layer change places."""
    node = _at(_stored(proto, bias=False), place)

    def change(weight: Array) -> Array:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        order = np.arange(weight.shape[axis])
        order[:2] = order[1::-1]
        return weight.take(order, axis)

    return node is not None and _change(proto, node.input[0], change)


def _activation(index: int, change: Callable[[Array], Array], *, only_back: bool = False) -> Tamper:
    def tamper(proto: onnx.ModelProto, place: str) -> bool:
        node = _at(_activations(proto), place)
        readers = [
            other for other in proto.graph.node if other.op_type == "DequantizeLinear" and other.input[0] == node.output[0]
        ]
        value = numpy_helper.to_array(_tensor(proto, node.input[index]))
        made = numpy_helper.from_array(change(value).astype(value.dtype), "tampered")
        proto.graph.initializer.append(made)
        for one in readers if only_back else [node, *readers]:
            one.input[index] = "tampered"
        return True

    return tamper


def _shifted_kernel(proto: onnx.ModelProto, place: str) -> bool:
    """A convolution is padded on other sides."""
    found = [
        attribute
        for node in proto.graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "pads" and attribute.ints[0] and attribute.ints[2]
    ]
    pads = _at(found, place)
    if pads is None:
        return False
    pads.ints[0], pads.ints[2] = pads.ints[0] - 1, pads.ints[2] + 1
    return True


def _swapped_channels(proto: onnx.ModelProto, place: str) -> bool:
    """Two channels of an activation change places behind its quantizer."""
    layers = [node for node in proto.graph.node if node.op_type == "Conv"]
    node = _at(layers, place)
    if node is None:
        return False
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    weight = next(other.input[0] for other in proto.graph.node if node.input[1] in other.output)
    channels = groups * _tensor(proto, weight).dims[1]
    if channels < 2:
        return False
    order = np.arange(channels)
    order[:2] = order[1::-1]
    proto.graph.initializer.append(numpy_helper.from_array(order, "order"))
    proto.graph.node.insert(
        list(proto.graph.node).index(node), helper.make_node("Gather", [node.input[0], "order"], ["turned"], axis=1)
    )
    node.input[0] = "turned"
    return True


def _output(op_type: str, by: float) -> Tamper:
    """The first or the last output, or where there is a middle one that, is changed."""

    def tamper(proto: onnx.ModelProto, place: str) -> bool:
        name = _at(list(proto.graph.output), place).name
        if place != "first" and len(proto.graph.output) == 1:
            return False
        node = next(node for node in proto.graph.node if name in node.output)
        node.output[list(node.output).index(name)] = "untouched"
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(by), "by"))
        for other in proto.graph.node:
            other.input[:] = ["untouched" if value == name else value for value in other.input]
        proto.graph.node.append(helper.make_node(op_type, ["untouched", "by"], [name]))
        return True

    return tamper


TAMPERS: dict[str, Tamper] = {
    "weight scale x 1.01": _weight_scale(1.01),
    "weight scale x 0.999": _weight_scale(0.999),
    "one channel's scale x 1.1": _weight_scale(1.1, channel=True),
    "one channel's scale x 2": _weight_scale(2.0, channel=True),
    "bias x 1.05": _bias,
    "weight zero point off by one": _weight_zero_point,
    "largest weight to 0": _one_weight,
    "two filters swapped": _swapped_weights,
    "activation scale x 1.01": _activation(1, lambda scale: scale * 1.01),
    "activation scale x 1.01 on the way back": _activation(1, lambda scale: scale * 1.01, only_back=True),
    "activation zero point off by one": _activation(2, lambda zero: np.where(zero < 100, zero + 1, zero - 1)),
    "kernel shifted": _shifted_kernel,
    "two channels swapped": _swapped_channels,
    "output zeroed": _output("Mul", 0.0),
    "output x 1.001": _output("Mul", 1.001),
}

if __name__ == "__main__":
    main()
