"""Biases: on the integer grid that their layers sum in, and corrected for the mean error of what is rounded before them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import notes
from dreamquant.network.operators import WEIGHTED, argument, bias_node, is_call, unquantized
from dreamquant.quantization.batchnorm import correct_biases
from dreamquant.quantization.forms import power_above, weight_form
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.moves import unmoved
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.walk import float_tensor, keep_float, quantizer_of, walk_by_layers

LARGEST_BIAS = 2**30  # of an int32; the rest is room for the sum of products


def settle_biases(student: Student, images: Tensor) -> None:
    """Put biases on their integer grid and, where the plan says so, correct them on the way, layer after layer.

    Once more for a student whose weights or grids have changed since: float biases are taken up again first. `images` are whole
    batches of a network that can run no other.
    """
    plan, graph = student.plan, student.network.graph
    restore_biases(student)
    rebase_biases(student)
    if plan.bias_correction == "none":
        return
    if plan.bias_correction == "batchnorm":
        correct_biases(student)
        rebase_biases(student)
        return

    biases = {node: unquantized(bias) for node in graph.graph.nodes if is_call(node, WEIGHTED) and (bias := bias_node(node))}
    own = {node: stored for node, stored in biases.items() if len(stored.users) == 1}  # others share errors of several layers
    errors: list[Tensor] = []  # of pieces of images, (N, C)
    shape: list[int] = []

    def look(node: fx.Node, quantized: Tensor, exact: Tensor) -> None:
        channel = quantized.dim() - 1 if node.target is torch.ops.aten.linear.default else 1
        axes = [axis for axis in range(1, quantized.dim()) if axis != channel]
        errors.append((quantized - exact).mean(axes) if axes else quantized - exact)
        shape[:] = [-1 if axis == channel else 1 for axis in range(quantized.dim())]

    def settle(node: fx.Node) -> Tensor:
        error = _expected(torch.cat(errors))
        errors.clear()
        keep_float(graph, own[node])
        set_tensor(graph, own[node], tensor_of(graph, own[node]) - error)
        return -error.view(shape)

    walk_by_layers(student.network, images, own, look, settle)
    rebase_biases(student)


def _expected(errors: Tensor) -> Tensor:
    """The mean error (C,) that other images are to be corrected by, from those of some images (N, C).

    Images that are made differ from those that will come more than they differ from one another, so that a mean which changes
    from image to image is another one there. Each is shrunk by m^2 / (m^2 + variance), what is left of the least expected square
    where the mean to come is off by as much as one image's (shrinkage: James and Stein, Estimation with Quadratic Loss, 1961).
    """
    mean, variance = errors.mean(0), errors.var(0, correction=0)
    return mean * (mean.square() / (mean.square() + variance)).nan_to_num(1.0)


def restore_biases(student: Student) -> None:
    """Give layers the float network's biases back, where they were corrected."""
    graph = student.network.graph
    for node in graph.graph.nodes:
        bias = bias_node(node) if is_call(node, WEIGHTED) else None
        if bias is not None and notes(unquantized(bias)).kept is not None:
            set_tensor(graph, unquantized(bias), float_tensor(graph, unquantized(bias)).clone())


def rebase_biases(student: Student) -> None:
    """Put integer biases on their grids; there are none where the plan leaves biases in float.

    int32 biases have the scale input scale x weight scale. Where a bias does not fit, as behind a channel of almost no
    weight, the weight's scale is raised until it does. A layer whose input is float keeps a float bias.
    """
    graph, plan = student.network.graph, student.plan
    for node in quantizer_nodes(graph.graph):
        if notes(node).kind != "bias":
            continue
        if plan.bias == "int8":
            low, high = tensor_of(graph, node.all_input_nodes[0]).aminmax()
            quantizer_of(graph, node).grid = weight_form(plan, 8).grid(low, high)
            continue
        layer = next(iter(node.users))
        source, weight_quantizer = unmoved(argument(layer, 0)), quantizer_of(graph, argument(layer, 1))
        input_grid = quantizer_of(graph, source).grid if source.op == "call_module" else None
        grid, bias = weight_quantizer.grid, tensor_of(graph, node.all_input_nodes[0])
        if not isinstance(input_grid, Grid) or not isinstance(grid, Grid):
            continue
        least = bias.abs() / (input_grid.scale * LARGEST_BIAS)
        groups = bias.numel() // grid.scale.numel()  # of a transposed convolution; with one scale for all, all channels
        scale = torch.maximum(grid.scale, least.view(groups, -1).amax(0))
        if plan.scales == "power_of_two":
            scale = power_above(scale)
        weight_quantizer.grid = Grid(scale, grid.zero_point, grid.qmin, grid.qmax, grid.axis)
        bias_scale = (input_grid.scale * scale).repeat(groups)
        quantizer_of(graph, node).grid = Grid(bias_scale, torch.zeros_like(bias_scale), -(2**31), 2**31 - 1, 0)
