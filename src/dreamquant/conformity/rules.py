"""The rules, one function each: what of a file a target refuses, or runs in float, by the plan that is named after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from dreamquant.conformity.opened import CLIPPING, DEQUANTIZE, QUANTIZE, Array, FileGrid, QuantizedFile, attributes, called
from dreamquant.quantization.forms import is_power_of_two
from dreamquant.quantization.plan import FixedOperator, Plan, Rule, Target
from dreamquant.quantization.sites import few_channels
from dreamquant.quantization.weights import LARGEST_SUM, largest_pairs

CLOSE = 1e-5  # of two scales that are the same but for their last digits
FIXED: dict[FixedOperator, str] = {
    "sigmoid": "Sigmoid",
    "hard_sigmoid": "HardSigmoid",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "tanh": "Tanh",
}
MOVES = {
    "MaxPool",
    "GlobalMaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Expand",
    "DepthToSpace",
    "SpaceToDepth",
}
AVERAGES = {"AveragePool", "GlobalAveragePool", "ReduceMean"}
SIDES = {"Add", "Sub", "Mul", "Div", "Max", "Min"}
READ_INTEGERS = {
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Add",
    "Concat",
    "Pad",
    "Gather",
    "Resize",
    QUANTIZE,
    *MOVES,
    *AVERAGES,
}
# which need what they are given on grids: those of all tensors that do arithmetic with stored ones
ARITHMETIC = SIDES | {"Pow", "PRelu", "Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Finding:
    """What of a file a rule is broken by: a node, as `called` has it, and how."""

    rule: Rule
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.node} {self.text}"


Found = Iterator[tuple[str, str]]  # (node, how)


def form(file: QuantizedFile, plan: Plan) -> Found:  # noqa: ARG001
    """Integers are told by QuantizeLinear and DequantizeLinear, whose scales are stored."""
    for node in file.nodes:
        own = node.domain not in ("", "ai.onnx") and node.op_type not in (QUANTIZE, DEQUANTIZE)
        if own or node.op_type.startswith("QLinear") or node.op_type in ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"):
            yield called(node), "is no operator between DequantizeLinear and QuantizeLinear"
    for node in file.dynamic:
        yield called(node), "has a scale that is computed, or integers of no known type"
    if not file.grids:
        yield "the file", "holds no QuantizeLinear or DequantizeLinear"


def types(file: QuantizedFile, plan: Plan) -> Found:
    """Integers are of the types that the target computes in."""
    target = _target(plan)
    signed = plan.activation_sign == "signed" or plan.activation_zero_point == "none"
    allowed = {f"{'' if signed else 'u'}int{_held(bits, 8)}" for bits in target.activation_bits}
    for grid in (*file.activations(), *file.constants()):
        if grid.kind not in allowed:
            yield grid.place, f"is of {grid.kind}, activations are of {_listed(allowed)}"
    signs = ("",) if plan.weight_symmetric else ("", "u")
    allowed = {f"{sign}int{_held(bits, 4)}" for bits in target.weight_bits for sign in signs}
    for layer in file.layers:
        if layer.grid is not None and layer.grid.kind not in allowed:
            yield called(layer.node), f"has weights of {layer.grid.kind}, they are of {_listed(allowed)}"


def zero_points(file: QuantizedFile, plan: Plan) -> Found:
    """What stands for 0 is where the target has it."""
    for grid in file.activations():
        least, largest = grid.limits
        middle = (least + largest + 1) // 2
        allowed = {"free": None, "none": (0,), "middle": (middle,), "ends": (least, middle)}[plan.activation_zero_point]
        if allowed is not None and not np.isin(grid.zero_point, allowed).all():
            yield grid.place, f"has the zero point {_number(grid.zero_point)}, not {' or '.join(map(str, allowed))}"
    for layer in file.layers:
        if plan.weight_symmetric and layer.grid is not None and layer.grid.zero_point.any():
            yield called(layer.node), f"has weights with the zero point {_number(layer.grid.zero_point)}, not 0"


def narrow_weights(file: QuantizedFile, plan: Plan) -> Found:
    """Weights leave out the least integer."""
    for layer in file.layers if plan.weight_narrow else ():
        integers = file.integers(layer.grid) if layer.grid is not None and layer.grid.signed else None
        if integers is not None and layer.grid is not None:
            count = int((integers == layer.grid.limits[0]).sum())
            if count:
                yield (
                    called(layer.node),
                    f"has {count:,} weights at {layer.grid.limits[0]}, the least is {layer.grid.limits[0] + 1}",
                )


def scales(file: QuantizedFile, plan: Plan) -> Found:
    """Scales are powers of two, or not too small."""
    if plan.scales == "power_of_two":
        for grid in file.grids.values():
            if grid.node.op_type == DEQUANTIZE and not all(is_power_of_two(scale) for scale in grid.scale.reshape(-1).tolist()):
                yield grid.place, f"has the scale {_number(grid.scale)}, which is no power of two"
    for grid in file.activations() if plan.minimum_range else ():
        whole = grid.scale * (grid.limits[1] - grid.limits[0])
        if (whole < plan.minimum_range * (1 - CLOSE)).any():
            yield grid.place, f"spans {_number(whole)}, the least is {plan.minimum_range:g}"


def granularity(file: QuantizedFile, plan: Plan) -> Found:
    """Activations have one scale, weights one or one for each output channel, where the target has those."""
    for grid in file.activations():
        if grid.scale.size > 1:
            yield grid.place, f"has {grid.scale.size} scales, activations have one"
    for layer in file.layers:
        if layer.grid is None or layer.grid.scale.size == 1:
            continue
        axis = layer.grid.axis % max(len(layer.shape), 1)
        if layer.operator in plan.per_tensor or plan.weight_granularity == "tensor":
            yield called(layer.node), f"has weights of {layer.grid.scale.size} scales, they have one"
        elif axis != layer.output_axis:
            yield called(layer.node), f"has weights with a scale along axis {axis}, output channels are axis {layer.output_axis}"


def bias(file: QuantizedFile, plan: Plan) -> Found:
    """Biases of layers in integers have the target's form."""
    for layer in file.layers:
        given = file.grid(layer.node.input[0])
        if layer.grid is None or given is None or len(layer.node.input) < 3 or not layer.node.input[2]:
            continue
        found = file.grid(layer.node.input[2])
        if (found is None) != (plan.bias == "float"):
            held = "float" if found is None else found.kind
            yield called(layer.node), f"has a bias in {held}, not in {plan.bias}"
        elif found is not None and found.kind != plan.bias:
            yield called(layer.node), f"has a bias of {found.kind}, not {plan.bias}"
        elif found is not None and plan.bias == "int32":
            expected = given.scale.reshape(-1) * layer.grid.scale.reshape(-1)
            repeated = np.resize(expected, found.scale.shape) if found.scale.size % expected.size == 0 else expected
            if repeated.shape != found.scale.shape or not np.allclose(found.scale, repeated, rtol=CLOSE, atol=0):
                yield called(layer.node), "has a bias whose scale is not that of its input times that of its weights"


def fixed(file: QuantizedFile, plan: Plan) -> Found:
    """Operators whose results have a grid of their own have that."""
    for one in plan.fixed:
        for node in file.nodes:
            for grid in file.given(node.output[0]) if node.op_type == FIXED[one.operator] else ():
                right = (
                    math.isclose(_first(grid.scale), 1 / one.steps, rel_tol=CLOSE) and _first(grid.zero_point) == one.zero_point
                )
                if grid.bits == one.bits and not right:
                    found = f"the scale {_number(grid.scale)} and the zero point {_number(grid.zero_point)}"
                    yield called(node), f"gives {found}, not 1/{one.steps:g} and {one.zero_point}"


def ties(file: QuantizedFile, plan: Plan) -> Found:
    """What shares a grid on the target has one grid."""
    tied = {
        *(MOVES if "moves" in plan.ties else ()),
        *(AVERAGES if "average" in plan.ties else ()),
        *(("Concat",) if "concat" in plan.ties else ()),
    }
    for node in file.nodes:
        if not node.output:
            continue
        given = [grid for name in node.input if name in file.computed and (grid := file.grid(name)) is not None]
        resized = node.op_type == "Resize" and ("moves" if attributes(node).get("mode", b"nearest") == b"nearest" else "resize")
        if node.op_type in tied or resized in plan.ties:
            different = _different([*given, *(file.given(node.output[0]) if given else ())])
            if different:
                yield called(node), f"reads and gives scales {different}, they have to be one"
        elif node.op_type in SIDES and "elementwise" in plan.ties and (different := _different(given)):
            yield called(node), f"reads scales {different}, they have to be one"


def placement(file: QuantizedFile, plan: Plan) -> Found:
    """Grids stand where the target looks for them."""
    if plan.placement == "inputs":
        yield from _on_inputs(file)
    elif plan.placement == "every_tensor":
        yield from _on_every_tensor(file)


def _on_inputs(file: QuantizedFile) -> Found:
    for name, grid in file.grids.items():
        if grid.node.op_type != DEQUANTIZE or name not in file.computed:
            continue
        if name in file.outputs:
            yield grid.place, f"gives the output {name}, which nothing computes in integers"
        for node in file.consumers.get(name, []):
            if node.op_type not in READ_INTEGERS and node.op_type != "Shape":
                yield called(node), "reads a DequantizeLinear, and runs in float"
    for layer in file.layers:
        if (layer.grid is None) != (file.grid(layer.node.input[1 - layer.place]) is None):
            held = "integers and float weights" if layer.grid is None else "float and integer weights"
            yield called(layer.node), f"reads {held}, and runs in float"


def _on_every_tensor(file: QuantizedFile) -> Found:
    for node in file.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE) or not file.computed.intersection(node.output):
            continue
        reads = [name for name in node.input if name in file.computed and file.is_float(name) and file.grid(name) is None]
        if reads and not (node.op_type in (*CLIPPING, "Max", "Min") and _is_merged(file, reads[0])):
            yield called(node), f"reads {reads[0]} in float"
            continue
        stored = [name for name in node.input if file.is_stored(name) and file.is_float(name) and file.grid(name) is None]
        places = ARITHMETIC - {"Max", "Min"} if reads else ARITHMETIC
        weights = [name for name in stored if not (node.op_type in ("Conv", "ConvTranspose", "Gemm") and name == _bias_of(node))]
        if weights and node.op_type in places:
            yield called(node), f"reads the stored {weights[0]} in float"
        for name in node.output:
            last = file.cut(name)
            readers = file.consumers.get(last, [])
            if not file.is_float(name) or (not readers and last not in file.outputs):
                continue
            if last in file.outputs or any(reader.op_type != QUANTIZE for reader in readers):
                yield called(node), f"gives {name} in float"
    for value in file.inputs:
        readers = file.consumers.get(value.name, [])
        if file.is_float(value.name) and any(reader.op_type != QUANTIZE for reader in readers):
            yield f"the input {value.name}", "is read in float"


def _bias_of(node: onnx.NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _is_merged(file: QuantizedFile, name: str) -> bool:
    """Whether a value is computed, and read by the clipping alone that it is merged with."""
    return name in file.producers and file.cut(name) != name


def too_small(file: QuantizedFile, plan: Plan) -> Found:
    """Convolutions of too few channels are float (see `sites.too_small`)."""
    for layer in file.layers if plan.float_below_channels else ():
        if layer.grid is None or layer.operator == "linear":
            continue
        groups = int(attributes(layer.node).get("group", 1))
        first = _comes_of_image(file, layer.node.input[0])
        transposed = layer.operator == "conv_transpose"
        if few_channels(layer.shape, groups, plan.float_below_channels, transposed=transposed, first=first):
            yield called(layer.node), f"has too few channels to gain, its weights are {layer.shape}; it is faster in float"


def _comes_of_image(file: QuantizedFile, name: str) -> bool:
    node = file.producers.get(name)
    while node is not None and node.op_type in (QUANTIZE, DEQUANTIZE):
        name = node.input[0]
        node = file.producers.get(name)
    return any(value.name == name for value in file.inputs)


def saturation_free(file: QuantizedFile, plan: Plan) -> Found:
    """No sum of two products overflows 16 bits (see `weights.saturation_free_scale`)."""
    for layer in file.layers if plan.saturation_free else ():
        read = file.grid(layer.node.input[1 - layer.place])
        depthwise = layer.operator != "linear" and layer.shape[1:2] == (1,) and attributes(layer.node).get("group", 1) != 1
        if read is None or depthwise or layer.grid is None or layer.grid.bits != 8:
            continue
        integers = file.integers(layer.grid)
        if integers is None:
            continue
        weight = torch.from_numpy(integers - (0 if layer.grid.signed else 128)).float()
        largest = largest_pairs(weight, layer.output_axis).max().item()
        if largest > LARGEST_SUM:
            yield called(layer.node), f"has neighbouring weights of the sum {largest:.0f}, the largest is {LARGEST_SUM}"


def static_shapes(file: QuantizedFile, plan: Plan) -> Found:
    """Every size of what the file takes is written down."""
    for value in file.inputs if _target(plan).static_shapes else ():
        sizes = value.type.tensor_type.shape.dim
        if any(size.dim_value < 1 for size in sizes):
            text = ", ".join(str(size.dim_value or size.dim_param or "?") for size in sizes)
            yield f"the input {value.name}", f"has sizes that are open: ({text})"


RULES: dict[Rule, Callable[[QuantizedFile, Plan], Found]] = {
    "form": form,
    "types": types,
    "zero_points": zero_points,
    "narrow_weights": narrow_weights,
    "scales": scales,
    "granularity": granularity,
    "bias": bias,
    "fixed": fixed,
    "ties": ties,
    "placement": placement,
    "too_small": too_small,
    "saturation_free": saturation_free,
    "static_shapes": static_shapes,
}


def _target(plan: Plan) -> Target:
    assert plan.target is not None
    return plan.target


def _held(bits: int, least: int) -> int:
    """The bits of the type that holds integers of so many."""
    return next(held for held in (least, 8, 16) if bits <= held)


def _different(grids: list[FileGrid]) -> str:
    """The scales of grids that are not all the same; empty where they are."""
    if all(grid.same(grids[0]) for grid in grids[1:]):
        return ""
    return _listed(
        {_number(grid.scale) + ("" if not grid.zero_point.any() else f" at {_number(grid.zero_point)}") for grid in grids}
    )


def _listed(texts: set[str]) -> str:
    return ", ".join(sorted(texts))


def _first(values: Array) -> float:
    return float(values.reshape(-1)[0])


def _number(values: Array) -> str:
    """The one number of an array, or the ends of several."""
    low, high = float(values.min()), float(values.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
