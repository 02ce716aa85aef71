"""Network + samples + plan -> student: every quantized tensor gets its grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError
from dreamquant.methods import find_method
from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.live import check_run
from dreamquant.network.operators import CONVOLUTIONS, WEIGHTED, is_call, output_channel_axis
from dreamquant.network.pairs import groups_of
from dreamquant.plain import plain_torch
from dreamquant.quantization.batchnorm import correct_biases, grids_from_batchnorm
from dreamquant.quantization.channel_bits import channel_bits, grid_of_channels
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.effect import Effect, effects, narrowed, together
from dreamquant.quantization.grid import FakeQuantize, Grid, grid_of_range
from dreamquant.quantization.plan import Plan, change_plan, load_plan, parse_bits
from dreamquant.quantization.sites import is_score
from dreamquant.quantization.student import Student, prepare, quantizer_nodes
from dreamquant.quantization.through import following_function, narrow
from dreamquant.quantization.walk import KEPT, Chunks, keep_float, quantizer_of, walk
from dreamquant.samples import Samples

CHUNK = 32  # images run at once
LARGEST_BIAS = 2**30  # of an int32; the rest is room for the sum of products


@plain_torch()
def quantize(network: Network, samples: Samples, *, bits: str = "W8A8", plan: str | Plan = "deploy", **changes: Any) -> Student:
    """The student of a network: `plan` says which tensors are quantized and how, `samples` set the ranges.

    `changes` replace fields of the plan, e.g. `weight_ranges="mse"`. Raises `OptionError` for names, bits and options that are
    not known, `DataError` for samples that do not fit the network, `ModelError` where `effect_limit` is set and scores have no
    gradient.
    """
    plan = load_plan(plan, **changes) if isinstance(plan, str) else change_plan(plan, **changes)
    width = parse_bits(bits)
    samples.check(network.input_shape)
    check_run(network, len(samples))
    activation_ranges = find_method("ranges", plan.activation_ranges)
    activation_options = activation_ranges.check_options(plan.activation_options)
    student, widths, deciders = prepare(network, plan, width)
    functions = {name: following_function(nodes) if plan.placement == "integer" else None for name, nodes in deciders.items()}
    chunk = network.batch or CHUNK
    images = samples.images
    if network.batch:  # only whole batches can be run; each image is to count as often as another
        images = images[torch.arange(-(-len(images) // chunk) * chunk) % len(images)]
    felt: dict[fx.Node, Effect] = {}
    if plan.effect_limit is not None and plan.range_source == "samples":
        felt = effects(student.network, {node for nodes in deciders.values() for node in nodes}, images)
    _weight_grids(student, widths)

    def find(name: str, values: list[Chunks]) -> Grid:
        flat = _by_image(values).unsqueeze(0)
        form: dict[str, Any] = {"bits": widths[name], "symmetric": plan.activation_symmetric}
        whole = plan.keep_scores and any(is_score(node) for node in deciders[name])
        low, high = flat.flatten(1).aminmax(dim=1) if whole else activation_ranges.function(flat, **form, **activation_options)
        function = functions[name]
        if function is not None:
            low, high = narrow(flat.flatten(1), low, high, function, **form)
        heard = [felt[node] for node in deciders[name] if node in felt]
        if plan.effect_limit is not None and heard and not whole:
            low, high = narrowed(low, high, together(heard), plan.effect_limit, **form)
        return grid_of_range(low, high, **form)

    if plan.range_source == "batchnorm":
        _set_grids(student, grids_from_batchnorm(student, widths, deciders))
    else:
        _activation_grids(student, images, deciders, find, chunk=chunk)
    settle_biases(student, images)
    return student


def _weight_grids(student: Student, widths: dict[str, int]) -> None:
    plan, graph = student.plan, student.network.graph
    method = find_method("ranges", plan.weight_ranges)
    options = method.check_options(plan.weight_options)
    codebook = None if plan.weight_levels == "uniform" else find_method("codebooks", plan.weight_levels)
    level_options = {} if codebook is None else codebook.check_options(plan.level_options)
    for node in quantizer_nodes(graph.graph):
        if node.meta["kind"] != "weight":
            continue
        weight = tensor_of(graph, node.all_input_nodes[0])
        layer = next(iter(node.users))
        granularity = plan.layer(layer.name).granularity or plan.weight_granularity
        axis = output_channel_axis(layer) if granularity == "channel" else None
        rows = weight.reshape(1, 1, -1) if axis is None else weight.transpose(0, axis).flatten(1).unsqueeze(1)
        bits = widths[str(node.target)]
        if codebook is not None:
            levels = codebook.function(rows.squeeze(1), bits=bits, **level_options)
            quantizer_of(graph, node).grid = Codebook(levels, axis)
            continue
        if plan.channel_bits and axis is not None:
            _give_channels_bits(student, node, layer, bits, partial(method.function, **options))
            continue
        low, high = method.function(rows, bits=bits, symmetric=plan.weight_symmetric, **options)
        grid = grid_of_range(low, high, bits=bits, symmetric=plan.weight_symmetric, axis=axis)
        if plan.saturation_free and grid.qmin < 0 and not is_depthwise(layer):
            grid = replace(grid, scale=torch.maximum(grid.scale, saturation_free_scale(weight, axis)))
        quantizer_of(graph, node).grid = grid


def _give_channels_bits(student: Student, node: fx.Node, layer: fx.Node, bits: int, find: Callable[..., Any]) -> None:
    """Put the weight that `node` quantizes on a grid whose channels have bits of their own, `bits` on average."""
    graph, stored, axis = student.network.graph, node.all_input_nodes[0], output_channel_axis(layer)
    if student.plan.weight_symmetric:
        raise OptionError(
            "channel_bits gives channels as few as 2 levels, which no symmetric grid has: set weight_symmetric=false"
        )
    turned = tensor_of(graph, stored).transpose(0, axis)
    rows = turned.flatten(1)
    grid, values = grid_of_channels(rows, channel_bits(rows, bits), find, axis)
    keep_float(graph, stored)
    set_tensor(graph, stored, values.view(turned.shape).transpose(0, axis).contiguous())
    quantizer_of(graph, node).grid = grid


def saturation_free_scale(weight: Tensor, axis: int | None) -> Tensor:
    """The smallest scales (1,) or (channels,) under which no two neighbouring weights overflow a 16-bit sum.

    x86 processors without VNNI multiply unsigned activations by signed weights in pairs and add each pair in saturating 16 bits:
    255 (w1 + w2) must stay within 32767, so two weights of one sign may add up to 128 at most. Neighbours are those along the
    order in which a runtime lines up a convolution's inputs: channels first, channels last, or channels of one position.
    """
    rows = weight if axis in (None, 0) else weight.transpose(0, axis)
    orders = [rows.flatten(1)]
    if rows.dim() > 2:
        last = rows.movedim(1, -1)
        orders += [last.flatten(1), last.flatten(1, -2)]
    worst = torch.stack([_largest_pair(order) for order in orders]).amax(0)
    scale = worst / 127  # not 128: both weights may be rounded up
    return scale.max().reshape(1) if axis is None else scale


def _largest_pair(rows: Tensor) -> Tensor:
    """The largest sum of neighbours (0, 1), (2, 3), ... of one sign, along the last axis, in each of (rows, ...)."""
    if rows.shape[-1] % 2:
        rows = torch.cat([rows, torch.zeros_like(rows[..., :1])], -1)
    pairs = rows.reshape(*rows.shape[:-1], -1, 2)
    sums = torch.maximum(pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1))
    return sums.flatten(1).amax(1)


def is_depthwise(layer: fx.Node) -> bool:
    """Whether each output channel of a convolution reads one input channel; runtimes add those in 32 bits."""
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    return is_call(layer, CONVOLUTIONS) and groups_of(layer) != 1 and int(weight.meta["shape"][1]) == 1


def _by_image(tensors: list[Chunks]) -> Tensor:
    """The values of tensors side by side: (images, n), or fewer rows where one tensor has more along its first axis."""
    whole = [torch.cat([value.flatten(1) for value in chunks]) for chunks in tensors]
    rows = math.gcd(*(len(value) for value in whole))
    return torch.cat([value.reshape(rows, -1) for value in whole], 1)


def _activation_grids(
    student: Student,
    images: Tensor,
    deciders: dict[str, tuple[fx.Node, ...]],
    find: Callable[[str, list[Chunks]], Grid],
    *,
    chunk: int,
) -> None:
    """Find every activation grid in one walk: on the float network's values or on the quantized prefix's.

    A grid that is shared is found where the last of its deciders is computed; tensors that come before are float until then.
    """
    graph = student.network.graph
    waiting = {name: {node.name for node in nodes} for name, nodes in deciders.items()}
    seen: dict[str, list[Chunks]] = {name: [] for name in deciders}
    found: dict[str, Grid] = {}

    def before(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        source, name = node.all_input_nodes[0].name, str(node.target)
        if source in waiting[name]:
            waiting[name].remove(source)
            seen[name].append(quantized if student.plan.observe == "quantized" else exact)
            if not waiting[name]:
                found[name] = find(name, seen.pop(name))
                if student.plan.observe == "quantized":
                    quantizer_of(graph, node).grid = found[name]

    walk(graph, images, chunk=chunk, before=before)
    _set_grids(student, found)


def _set_grids(student: Student, grids: dict[str, Grid]) -> None:
    for name, grid in grids.items():
        quantizer = student.network.graph.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        quantizer.grid = grid


def settle_biases(student: Student, images: Tensor) -> None:
    """Put biases on their integer grid and, where the plan says so, correct them on the way, layer after layer.

    Once more for a student whose weights or grids have changed since: float biases are taken up again first. `images` are whole
    batches of a network that can run no other.
    """
    plan, graph = student.plan, student.network.graph
    restore_biases(student)
    if plan.integer_bias:
        rebase_biases(student)
    if plan.bias_correction == "none":
        return
    if plan.bias_correction == "batchnorm":
        correct_biases(student)
        rebase_biases(student)
        return

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        bias = node.args[2] if is_call(node, WEIGHTED) and len(node.args) > 2 else None
        if not isinstance(bias, fx.Node):
            return
        stored = bias.all_input_nodes[0] if bias.op == "call_module" else bias
        if len(stored.users) > 1:
            return  # shared by layers with errors of their own
        channel = quantized[0].dim() - 1 if node.target is torch.ops.aten.linear.default else 1
        axes = [axis for axis in range(quantized[0].dim()) if axis != channel]
        count = sum(len(value) for value in quantized)
        error = sum(((q - e).mean(axes) * (len(q) / count) for q, e in zip(quantized, exact, strict=True)), torch.zeros(()))
        keep_float(graph, stored)
        set_tensor(graph, stored, tensor_of(graph, stored) - error)
        shape = [1] * quantized[0].dim()
        shape[channel] = -1
        for index, value in enumerate(quantized):
            quantized[index] = value - error.view(shape)

    walk(graph, images, chunk=student.network.batch or CHUNK, after=after)
    rebase_biases(student)


def restore_biases(student: Student) -> None:
    """Give layers the float network's biases back, where they were corrected."""
    graph = student.network.graph
    for node in graph.graph.nodes:
        bias = node.args[2] if is_call(node, WEIGHTED) and len(node.args) > 2 else None
        if isinstance(bias, fx.Node):
            stored = bias.all_input_nodes[0] if bias.op == "call_module" else bias
            if KEPT in stored.meta:
                set_tensor(graph, stored, graph.get_buffer(stored.meta[KEPT]).clone())


def rebase_biases(student: Student) -> None:
    """int32 biases have the scale input scale x weight scale. Where a bias does not fit, as behind a channel of almost no
    weight, the weight's scale is raised until it does. A layer whose input is float keeps a float bias."""
    graph = student.network.graph
    for node in quantizer_nodes(graph.graph):
        if node.meta["kind"] != "bias":
            continue
        layer = next(iter(node.users))
        source, weight = layer.args[0], layer.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(weight, fx.Node)
        input_grid = quantizer_of(graph, source).grid if source.op == "call_module" else None
        weight_quantizer = quantizer_of(graph, weight)
        grid, bias = weight_quantizer.grid, tensor_of(graph, node.all_input_nodes[0])
        if not isinstance(input_grid, Grid) or not isinstance(grid, Grid):
            continue
        least = bias.abs() / (input_grid.scale * LARGEST_BIAS)
        groups = bias.numel() // grid.scale.numel()  # of a transposed convolution; with one scale for all, all channels
        scale = torch.maximum(grid.scale, least.view(groups, -1).amax(0))
        weight_quantizer.grid = Grid(scale, grid.zero_point, grid.qmin, grid.qmax, grid.axis)
        bias_scale = (input_grid.scale * scale).repeat(groups)
        quantizer_of(graph, node).grid = Grid(bias_scale, torch.zeros_like(bias_scale), -(2**31), 2**31 - 1, 0)
