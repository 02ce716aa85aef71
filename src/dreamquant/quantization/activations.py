"""Activations: the grid of every tensor that is quantized, from its values on samples or from BatchNorm statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.methods import find_method
from dreamquant.quantization.batchnorm import grids_from_batchnorm
from dreamquant.quantization.effect import Effect, effects, narrowed, together
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.sites import score_nodes
from dreamquant.quantization.student import Student
from dreamquant.quantization.through import following_function, narrow
from dreamquant.quantization.walk import Chunks, quantizer_named, quantizer_of, walk

Deciders = dict[str, tuple[fx.Node, ...]]  # as from `prepare`
Find = Callable[[str, list[Chunks]], Grid]


def grid_finder(student: Student, widths: dict[str, int], deciders: Deciders, images: Tensor) -> Find:
    """A function that finds the grid of a quantizer, by its name, from the values of its deciders.

    `widths` and `deciders` as from `prepare`, whose student it has to be: the effects of errors are those on the float network.
    Raises `OptionError` for unknown options, `ModelError` where `effect_limit` is set and scores have no gradient.
    """
    plan = student.plan
    ranges = find_method("ranges", plan.activation_ranges)
    by_default = partial(ranges.function, **ranges.check_options(plan.activation_options))
    own = {name: find_method("ranges", method).function for name, method in plan.tensor_ranges.items()}
    functions = {name: following_function(nodes) if plan.placement == "integer" else None for name, nodes in deciders.items()}
    scores = score_nodes(next(iter(deciders.values()))[0].graph) if deciders and plan.keep_scores else set()
    felt: dict[fx.Node, Effect] = {}
    if plan.effect_limit is not None and plan.range_source == "samples":
        felt = effects(student.network, {node for nodes in deciders.values() for node in nodes}, images)

    def find(name: str, values: list[Chunks]) -> Grid:
        flat = _by_image(values).unsqueeze(0)
        form: dict[str, Any] = {"bits": widths[name], "symmetric": plan.activation_symmetric}
        whole = plan.keep_scores and any(node in scores for node in deciders[name])
        low, high = flat.flatten(1).aminmax(dim=1) if whole else own.get(name, by_default)(flat, **form)
        function = functions[name]
        if function is not None:
            low, high = narrow(flat.flatten(1), low, high, function, **form)
        heard = [felt[node] for node in deciders[name] if node in felt]
        if plan.effect_limit is not None and heard and not whole:
            low, high = narrowed(low, high, together(heard), plan.effect_limit, **form)
        return grid_of_range(low, high, **form)

    return find


def activation_grids(student: Student, widths: dict[str, int], deciders: Deciders, images: Tensor, find: Find) -> None:
    """Give every activation its grid: from BatchNorm statistics where the plan says so, else by `find` from the values that
    images (N, C, H, W) have there."""
    if student.plan.range_source == "batchnorm":
        set_grids(student, grids_from_batchnorm(student, widths, deciders))
    else:
        _grids_of_samples(student, images, deciders, find)


def _by_image(tensors: list[Chunks]) -> Tensor:
    """The values of tensors side by side: (images, n), or fewer rows where one tensor has more along its first axis."""
    whole = [torch.cat([value.flatten(1) for value in chunks]) for chunks in tensors]
    rows = math.gcd(*(len(value) for value in whole))
    return torch.cat([value.reshape(rows, -1) for value in whole], 1)


def _grids_of_samples(student: Student, images: Tensor, deciders: Deciders, find: Find) -> None:
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

    walk(student.network, images, before=before)
    set_grids(student, found)


def set_grids(student: Student, grids: Mapping[str, Grid]) -> None:
    """Put grids in, by their quantizers' names."""
    for name, grid in grids.items():
        quantizer_named(student.network.graph, name).grid = grid
