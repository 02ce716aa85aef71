"""Zeros around a tensor, where the runtime would put them there in float: merged into the layer behind, or put there in integers.

ONNX Runtime runs a Pad between DequantizeLinear and QuantizeLinear as it is written. A convolution adds zeros for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from dreamquant.exporters.surgery import Surgery
from dreamquant.network.padding import Padding, merged_padding, pads_with_zeros
from dreamquant.quantization.student import QuantizedTensor, Student


def merge_pads(surgery: Surgery, student: Student, names: Mapping[str, str]) -> None:
    """Let convolutions and average poolings pad what they read themselves, where the student does not quantize it in between."""
    for node in student.network.graph.graph.nodes:
        padding = merged_padding(node)
        pad = surgery.producer(names[node.name]) if padding is not None and node.name in names else None
        if padding is None or pad is None or pad.op_type != "Pad" or pad.output[0] in surgery.outputs:
            continue
        readers = surgery.consumers(pad.output[0])
        if all(reader.op_type in ("Conv", "AveragePool") and _pads(reader, padding) is not None for reader in readers):
            for reader in readers:
                _take(reader, padding)
            surgery.rewire(pad.output[0], pad.input[0], readers)
            surgery.remove(pad.output[0])


def _pads(reader: onnx.NodeProto, padding: Padding) -> list[int] | None:
    """What a reader pads in all, at the low ends and then at the high ones; None where the file leaves that to its sizes."""
    known = {attribute.name: helper.get_attribute_value(attribute) for attribute in reader.attribute}
    if known.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    more = [*padding.before, *padding.after]
    return [own + added for own, added in zip(known.get("pads", [0] * len(more)), more, strict=True)]


def _take(reader: onnx.NodeProto, padding: Padding) -> None:
    pads = _pads(reader, padding)
    replaced = {"pads": pads} | ({"count_include_pad": 1} if reader.op_type == "AveragePool" else {})
    kept = [attribute for attribute in reader.attribute if attribute.name not in (*replaced, "auto_pad")]
    del reader.attribute[:]
    reader.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in replaced.items())])


def pad_integers(surgery: Surgery, tensor: QuantizedTensor, integers: str) -> None:
    """DequantizeLinear -> Pad -> QuantizeLinear on one grid: the integers are padded, with the zero point, and called `integers`.

    Leaves alone what stands on another grid, or is cut off in between.
    """
    if not pads_with_zeros(tensor.node) or tensor.node.all_input_nodes[0].target != tensor.quantizer.target:
        return
    quantize = surgery.producer(integers)
    pad = surgery.producer(quantize.input[0]) if quantize is not None else None
    if quantize is None or pad is None or pad.op_type != "Pad":
        return
    dequantize = surgery.producer(pad.input[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or surgery.consumers(pad.output[0]) != [quantize]:
        return
    pad.input[:] = [dequantize.input[0], pad.input[1], quantize.input[2], *pad.input[3:]]
    surgery.remove(integers)
    surgery.rename_output(pad.output[0], integers)
    if not surgery.consumers(dequantize.output[0]) and dequantize.output[0] not in surgery.outputs:
        surgery.remove(dequantize.output[0])
