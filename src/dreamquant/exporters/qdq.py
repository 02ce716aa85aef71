"""Student -> ONNX with QuantizeLinear / DequantizeLinear around every quantized tensor.

A network that came from an ONNX file goes out as the same graph; any other is first emitted as a float graph. Weights and
biases are stored as integers, weights in the smallest type that ONNX has: 4 bits, 8 or 16 (opset 21 but for 8). Weights on a
codebook are looked up in a table (see `codebooks`). Activations are in 8 bits or 16: ONNX Runtime refuses a Clip before a 4-bit
QuantizeLinear; narrower grids are cut off by Max and Min. (By a Clip ONNX Runtime would take the layer before it for an integer
one, and round its float bias to the coarse grid of few bits.) A Max also stands behind layers of float weights and of codebooks,
where it changes nothing: without it ONNX Runtime would round these to 8 bits, with one scale for all channels.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from dreamquant.conformity import require
from dreamquant.devices import CPU
from dreamquant.errors import UnsupportedOperator
from dreamquant.exporters.codebooks import comes_of, float_results, looked_up
from dreamquant.exporters.float_layers import float_layers
from dreamquant.exporters.onnx_emit import OPSETS, emit_network, newest_opset
from dreamquant.exporters.packing import array, packed
from dreamquant.exporters.pads import merge_pads, pad_integers
from dreamquant.exporters.scalars import quantize_scalars
from dreamquant.exporters.static import with_fixed_shapes
from dreamquant.exporters.surgery import Surgery, with_tail
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.notes import Kind, notes
from dreamquant.network.onnx_import.standard import lifted, opset_of
from dreamquant.network.operators import WEIGHTED, data_inputs, is_call, unquantized
from dreamquant.quantization.activations import set_grids
from dreamquant.quantization.biases import rebase_biases
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.fixed import fixed_grid
from dreamquant.quantization.forms import activation_form
from dreamquant.quantization.grid import Grid, integer_limits
from dreamquant.quantization.plan import LARGEST_BITS, Plan, change_plan, parse_bits
from dreamquant.quantization.student import QuantizedTensor, Student, prepare, quantizer_nodes
from dreamquant.quantization.weights import weight_grids

INT8_OPSET = 13
WHOLE_OPSET = 20  # from which on functions of several steps, as GELU, are one operator, with no tensors inside
OPSETS_OF = {4: 21, 8: INT8_OPSET, 16: 21, 32: INT8_OPSET}  # from which on Q/DQ know integers of so many bits
Names = dict[str, str]  # node of the student's graph -> value of the ONNX model


class Stored(NamedTuple):
    """Where a model holds a tensor that the student stores: the value that layers read, and whether it is turned round."""

    value: str
    transposed: bool


class OnnxStudent(NamedTuple):
    """A student as an ONNX model, and where it is in there.

    `integers`: by the student's activation quantizers, the values that hold their integers. `stored`: by the quantizers of
    weights and biases, and by the nodes of stored tensors that layers read as they are, the values that hold these. `outputs`:
    the values that the student's graph gives. `names`: the values of its nodes.
    """

    proto: onnx.ModelProto
    integers: Names
    stored: dict[str, Stored]
    outputs: tuple[str, ...]
    names: Names


def to_onnx(student: Student) -> OnnxStudent:
    """The student as an ONNX model; raises `UnsupportedOperator` for what ONNX cannot say."""
    tensors = student.tensors()
    opset = max([INT8_OPSET, *(OPSETS_OF[_container_bits(tensor)] for tensor in tensors)])
    proto, outputs, names, transposed = _float_model(student, opset)
    surgery = Surgery(proto)
    surgery.require_opset(opset)
    _fold(surgery, student)
    _update_constants(surgery, student, names, transposed)
    merge_pads(surgery, student, names)
    constants: dict[str, tuple[str, str]] = {}
    in_float = float_layers(student)
    floats = float_results(student, names, in_float)
    sources: dict[str, tuple[str, bool]] = {}
    integers: Names = {}
    stored: dict[str, Stored] = {}
    for tensor in tensors:
        if tensor.kind == "activation":
            integers[tensor.quantizer.name] = _quantize_activation(surgery, tensor, names, sources, constants, floats)
        elif (value := _constant(surgery, student, tensor, names, transposed, in_float)) is not None:
            stored[tensor.quantizer.name] = Stored(value, tensor.node.name in transposed)
    for tensor in tensors:
        if tensor.quantizer.name in integers:
            pad_integers(surgery, tensor, integers[tensor.quantizer.name])
    if student.plan.placement == "every_tensor":
        quantize_scalars(surgery, activation_form(student.plan, student.bits.activations))
    proto = surgery.finish()
    return OnnxStudent(proto, integers, stored | _left_as_they_are(student, proto, names, transposed), outputs, names)


def check_writable(network: Network, plan: Plan, bits: str) -> None:
    """`UnsupportedOperator` where the student of a network could not be written, or would break a rule of the plan's target;
    told before any work is done."""
    student, widths, _ = prepare(network, plan, parse_bits(bits))
    quantizers = quantizer_nodes(student.network.graph.graph)
    kinds = [(notes(node).kind, widths.get(str(node.target), LARGEST_BITS)) for node in quantizers]
    opset = max([INT8_OPSET, *(OPSETS_OF[_container(kind, bits)] for kind, bits in kinds)])
    proto, _, names, _ = _float_model(student, opset)
    if opset_of(proto) < opset:
        lifted(proto, opset, "the ONNX model")
    for node in quantizers:
        if notes(node).kind == "activation":
            _check_named(unquantized(node.all_input_nodes[0]), names)
    if plan.target is not None:
        require(to_onnx(_draft(network.to(CPU), plan, bits)).proto, plan)


def _draft(network: Network, plan: Plan, bits: str) -> Student:
    """A student in its last form, but for the ranges of activations: all are from -1 to 1."""
    student, widths, deciders = prepare(network, change_plan(plan, weight_ranges="minmax", weight_options={}), parse_bits(bits))
    weight_grids(student, widths)
    ends = torch.tensor([-1.0]), torch.tensor([1.0])
    for name, nodes in deciders.items():
        found = fixed_grid(nodes, plan, widths[name], CPU) or activation_form(plan, widths[name]).grid(*ends)
        set_grids(student, {name: found})
    rebase_biases(student)
    return student


def _check_named(node: fx.Node, names: Names) -> None:
    if node.name not in names:
        raise UnsupportedOperator(f"{node.name} is quantized but is no value of the ONNX model")


def _left_as_they_are(student: Student, proto: onnx.ModelProto, names: Names, transposed: set[str]) -> dict[str, Stored]:
    """The stored tensors of the student that its layers read without a quantizer, where the model has them under their names."""
    read = {name for node in proto.graph.node for name in node.input}
    held = {tensor.name for tensor in proto.graph.initializer}
    held |= {name for node in proto.graph.node if node.op_type == "Constant" for name in node.output}
    return {
        node.name: Stored(names[node.name], node.name in transposed)
        for node in student.network.graph.graph.nodes
        if node.op == "get_attr" and any(user.op != "call_module" for user in node.users)
        if names.get(node.name) in held & read
    }


def _float_model(student: Student, opset: int) -> tuple[onnx.ModelProto, tuple[str, ...], Names, set[str]]:
    """The float ONNX model, the values in it that the student's graph gives, the names of its tensors, and the nodes that the
    model stores transposed."""
    network, graph = student.network, student.network.graph
    proto, outputs = network.source.proto, network.source.ends
    if proto is None:
        graph = _without_quantizers(graph)
        if student.plan.placement == "every_tensor":
            opset = max(opset, WHOLE_OPSET)
        proto = emit_network(network, graph, opset=max(opset, min(newest_opset(network), OPSETS[-1])))
        outputs = tuple(output.name for output in proto.graph.output)
        if network.source.tail is not None:
            proto = with_tail(proto, network.source.tail, dict(zip(network.source.ends, outputs, strict=True)))
    target = student.plan.target
    if target is not None and target.static_shapes:
        channels, height, width = network.input_shape
        image = (height, width, channels) if network.space.layout == "NHWC" else (channels, height, width)
        proto = with_fixed_shapes(proto, (network.batch or 1, *image), network.space.layout)
    nodes = graph.graph.nodes
    names = {node.name: origin for node in nodes if (origin := notes(node).origin) is not None}
    return proto, outputs, names, {node.name for node in nodes if notes(node).transposed}


def _without_quantizers(graph: fx.GraphModule) -> fx.GraphModule:
    plain = copy.deepcopy(graph)
    for node in quantizer_nodes(plain.graph):
        node.replace_all_uses_with(node.all_input_nodes[0])
        plain.graph.erase_node(node)
    plain.recompile()
    return plain


def _fold(surgery: Surgery, student: Student) -> None:
    """Take out the BatchNorms of the incoming file that the student has folded into the layers before them."""
    if student.network.source.proto is None:
        return
    for node in student.network.graph.graph.nodes:
        known = notes(node)
        if known.absorbed:
            assert known.origin is not None
            for value in (*known.absorbed[1:], known.origin):
                surgery.remove(value)
            surgery.rename_output(known.absorbed[0], known.origin)


def _update_constants(surgery: Surgery, student: Student, names: Names, transposed: set[str]) -> None:
    """Write the student's stored tensors, where they are not those of the file any more, and biases that it gained."""
    if student.network.source.proto is None:
        return  # emitted from the student itself
    graph = student.network.graph
    layers = {node.name: node for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        value = tensor_of(graph, node)
        if node.name in names and notes(node).changed:
            surgery.replace_constant(names[node.name], array(value.t() if node.name in transposed else value))
        elif node.name not in names and (gained := notes(node).gained) is not None:
            result = names[gained]
            names[node.name] = surgery.constant(f"{result}_bias", array(value))
            product = _add_bias(surgery, result, names[node.name])
            if not is_call(layers[gained], WEIGHTED):  # a sum that the student has apart from its layer
                names[unquantized(data_inputs(layers[gained])[0]).name] = product


def _add_bias(surgery: Surgery, result: str, bias: str) -> str:
    """Let the layer that computes `result`, and had no bias, add one. Returns what it computes before."""
    layer = surgery.producer(result)
    assert layer is not None
    if layer.op_type == "MatMul":
        product = surgery.fresh(f"{result}_product")
        surgery.rename_output(result, product)
        surgery.insert("Add", [product, bias], result, after=product)
        return product
    layer.input[2:] = [bias]
    return result


def _quantize_activation(
    surgery: Surgery,
    tensor: QuantizedTensor,
    names: Names,
    sources: dict[str, tuple[str, bool]],
    constants: dict[str, tuple[str, str]],
    floats: set[str],
) -> str:
    """value -> [Max] -> [Min] -> QuantizeLinear -> DequantizeLinear, whose result takes the value's name for all who read it.

    A tensor that is on a second grid for some of its readers, which are not quantized yet, gives them another result.
    Returns the name of what lies between the last two.
    """
    _check_named(tensor.node, names)
    value, grid = names[tensor.node.name], _grid(tensor)
    shared = str(tensor.quantizer.target)
    if shared not in constants:
        constants[shared] = _scale_and_zero_point(surgery, tensor)
    scale, zero_point = constants[shared]
    if tensor.node.name in sources:
        (source, guarded), result = sources[tensor.node.name], surgery.fresh("dequantized")
        surgery.rewire(value, result, [_node(surgery, user, names) for user in tensor.quantizer.users])
    else:
        guarded = comes_of(surgery, value, floats)
        if any(notes(user).kind is None for user in tensor.node.users):  # others read the tensor as it is
            source, result = value, surgery.fresh("dequantized")
            surgery.rewire(value, result, [_node(surgery, user, names) for user in tensor.quantizer.users])
        elif surgery.producer(value) is None:  # an input of the graph keeps its name; its readers are moved
            source, result = value, surgery.fresh("dequantized")
            surgery.rewire(value, result)
        else:
            source, result = surgery.fresh("float"), value
            surgery.rename_output(value, source)
        sources[tensor.node.name] = source, guarded
    container = integer_limits(_container_bits(tensor), signed=grid.qmin < 0)
    for op_type, limit, widest in zip(("Max", "Min"), (grid.qmin, grid.qmax), container, strict=True):
        if limit != widest or (guarded and op_type == "Max"):
            end = np.asarray((limit - grid.zero_point.item()) * grid.scale.item(), np.float32)
            cut = surgery.fresh(op_type.lower())
            surgery.insert(op_type, [source, surgery.constant(f"{cut}_end", end)], cut, after=source)
            source = cut
    names[tensor.quantizer.name] = result
    integers = surgery.fresh("integers")
    surgery.insert("QuantizeLinear", [source, scale, zero_point], integers, after=source)
    surgery.insert("DequantizeLinear", [integers, scale, zero_point], result, after=integers)
    return integers


def _constant(
    surgery: Surgery,
    student: Student,
    tensor: QuantizedTensor,
    names: Names,
    transposed: set[str],
    in_float: Collection[fx.Node],
) -> str | None:
    """A stored tensor becomes integers -> DequantizeLinear, or indices -> levels, for the layers that read it; where all of these
    run in float, floats on the levels.

    A weight is dequantized once for all its layers; a bias has a grid of its own in each. Returns the name of the result, None
    where no layer was left to read it.
    """
    name = names[tensor.node.name]
    readers = surgery.consumers(name)
    if tensor.kind == "bias":
        layer = _node(surgery, next(iter(tensor.quantizer.users)), names)
        readers = [node for node in readers if node is layer]
    if not readers:
        return None
    value = tensor_of(student.network.graph, tensor.node)
    turned = tensor.node.name in transposed
    if all(user in in_float for user in tensor.quantizer.users):
        levels = _grid(tensor).fake(value)
        result = surgery.constant(f"{name}_levels", array(levels.t() if turned else levels))
    elif tensor.kind == "weight" and isinstance(tensor.grid, Codebook):
        result = looked_up(surgery, name, tensor.grid, value, transposed=turned)
    else:
        result = _dequantized(surgery, name, tensor, value, transposed=turned)
    surgery.rewire(name, result, readers)
    return result


def _dequantized(surgery: Surgery, name: str, tensor: QuantizedTensor, value: Tensor, *, transposed: bool) -> str:
    """The name of the stored tensor `name`, dequantized."""
    grid = _grid(tensor)
    scale, zero_point = grid.shaped(value.dim())
    levels = grid.fake(value).double()  # the student's: from the value itself, double precision rounds ties another way
    integers = (torch.round(levels / scale.double()) + zero_point).clamp(grid.qmin, grid.qmax)
    axis = grid.axis
    if transposed:
        integers, axis = integers.t(), None if axis is None else 1 - axis
    stored = _integers(integers, tensor)
    points = []
    if tensor.kind != "bias":  # whose zero point is always 0, which needs no saying
        points = [surgery.constant("zero", _integers(_shape(grid.zero_point, axis), tensor))]
    integers_name = surgery.constant(f"{name}_q", stored)
    scales = surgery.constant("scale", array(_shape(grid.scale, axis)))
    result = surgery.fresh("dequantized")
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    surgery.insert("DequantizeLinear", [integers_name, scales, *points], result, **attributes)
    return result


def _node(surgery: Surgery, reader: fx.Node, names: Names) -> onnx.NodeProto:
    """The node of the model that computes what a node of the student does, and maybe more; its output is not quantized yet."""
    while reader.name not in names:  # the file's node has a step behind it
        reader = next(iter(reader.users))
    found = surgery.producer(names[reader.name])
    assert found is not None
    return found


def _scale_and_zero_point(surgery: Surgery, tensor: QuantizedTensor) -> tuple[str, str]:
    grid = _grid(tensor)
    return (
        surgery.constant("scale", array(_shape(grid.scale, None))),
        surgery.constant("zero", _integers(_shape(grid.zero_point, None), tensor)),
    )


def _grid(tensor: QuantizedTensor) -> Grid:
    """The even levels of a tensor; `UnsupportedOperator` for a codebook, whose levels QuantizeLinear does not know."""
    if isinstance(tensor.grid, Codebook):
        raise UnsupportedOperator(
            f"the {tensor.kind} {tensor.node.name} is quantized to a codebook; ONNX can write that of weights only"
        )
    return tensor.grid


def _shape(values: Tensor, axis: int | None) -> Tensor:
    return values.reshape(()) if axis is None else values.reshape(-1)


def _container_bits(tensor: QuantizedTensor) -> int:
    """The bits of the ONNX integer type that holds a tensor's integers."""
    return _container(tensor.kind, tensor.grid.bits)


def _container(kind: Kind | None, bits: int) -> int:
    few = 4 if kind == "weight" else 8
    return next(held for held in (few, 8, 16, 32) if bits <= held)


def _integers(values: Tensor, tensor: QuantizedTensor) -> onnx.TensorProto:
    """Whole numbers in the tensor's container type."""
    return packed(values, bits=_container_bits(tensor), signed=_grid(tensor).qmin < 0)
