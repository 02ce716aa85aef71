"""Activation grids and bias corrections from BatchNorm statistics alone: no sample is looked at (Nagel et al., ICCV 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dreamquant.errors import OptionError
from dreamquant.network.distribution import Distribution, distributions, has_statistics, run_layer
from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import tensor_of
from dreamquant.network.notes import notes
from dreamquant.network.operators import LINEARS, bias_node, data_inputs, data_nodes, unquantized
from dreamquant.quantization.fixed import fixed_grid
from dreamquant.quantization.forms import activation_form
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.through import following_function, narrow
from dreamquant.quantization.walk import keep_float, quantizer_of


def grids_from_batchnorm(student: Student, widths: dict[str, int], deciders: dict[str, tuple[fx.Node, ...]]) -> dict[str, Grid]:
    """The activation grids of a student, by the quantizers' names: mean +- `plan.deviations` deviations of the widest channels.

    `widths` and `deciders` as from `prepare`. Raises `OptionError` for a network without BatchNorm statistics, and where they do
    not reach a tensor that is to be quantized.
    """
    plan, graph = student.plan, student.network.graph.graph
    known = _known(student, "range_source")
    missing = [node for nodes in deciders.values() for node in nodes if node not in known]
    if missing:
        nodes = data_nodes(graph)
        unknown = [node for node in nodes if node not in known]
        culprits = [node for node in unknown if not any(source in unknown for source in data_inputs(node))]
        raise OptionError(
            f"range_source='batchnorm' knows no range of {_names(missing)}: BatchNorm statistics cannot be followed through "
            f"{', '.join(f'{node.name} ({node.target})' for node in culprits)}; use range_source='samples'"
        )
    grids = {}
    for name, decisive in deciders.items():
        fixed = fixed_grid(decisive, plan, widths[name], student.network.device)
        if fixed is not None:
            grids[name] = fixed
            continue
        low = torch.stack([known[node].low.min() for node in decisive]).min().reshape(1).float()
        high = torch.stack([known[node].high.max() for node in decisive]).max().reshape(1).float()
        whole_form = activation_form(plan, widths[name])
        form: dict[str, Any] = {"bits": widths[name], "symmetric": whole_form.symmetric(low)}
        function = following_function(decisive) if plan.placement == "integer" else None
        if function is not None:
            low, high = narrow(known[decisive[0]].typical().float().reshape(1, -1), low, high, function, **form)
        grids[name] = whole_form.grid(low, high)
    return grids


def correct_biases(student: Student) -> None:
    """Take off each bias what the rounding of its layer's weights adds to the mean output: sum of (Wq - W) E[x] (section 4.2).

    Where padding cuts a kernel off, so it is here: the mean is over all places of the output, where the paper's takes whole
    kernels. Layers without a bias, with one that they share, or whose E[x] is not known are left as they are; `OptionError` when
    those are all.
    """
    known, graph = _known(student, "bias_correction"), student.network.graph
    corrected = 0
    for quantizer in quantizer_nodes(graph.graph):
        if notes(quantizer).kind != "weight":
            continue
        layer, grid = next(iter(quantizer.users)), quantizer_of(graph, quantizer).grid
        source, bias = layer.args[0], bias_node(layer)
        if not isinstance(source, fx.Node) or source not in known or bias is None or grid is None:
            continue
        bias = unquantized(bias)
        if len(bias.users) > 1:
            continue  # shared by layers with errors of their own
        weight = tensor_of(graph, quantizer.all_input_nodes[0])
        error = run_layer(layer, known[source].mean, grid.fake(weight) - weight, None)
        channel = error.dim() - 1 if layer.target in LINEARS else 1
        mean = error.mean([axis for axis in range(error.dim()) if axis != channel])
        keep_float(graph, bias)
        set_tensor(graph, bias, tensor_of(graph, bias) - mean.float())
        corrected += 1
    if not corrected:
        raise OptionError(
            "bias_correction='batchnorm' can correct no layer: none that has a bias of its own reads a tensor whose mean the "
            "network's BatchNorms tell; use bias_correction='samples'"
        )


def _known(student: Student, field: str) -> dict[fx.Node, Distribution]:
    if not has_statistics(student.network.graph.graph):
        raise OptionError(
            f"{field}='batchnorm' needs BatchNorm statistics and the network has none: its BatchNorms were folded before it came "
            f"here, or it never had any; use {field}='samples'"
        )
    return distributions(student.network, deviations=student.plan.deviations)


def _names(nodes: list[fx.Node], most: int = 5) -> str:
    shown = ", ".join(node.name for node in nodes[:most])
    return shown if len(nodes) <= most else f"{shown} and {len(nodes) - most} more"
