"""Activations: the grid of every tensor that is quantized, from its values on samples or from BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.methods import find_method
from dreamquant.network.front import constants
from dreamquant.network.graph import in_pieces
from dreamquant.network.interpreter import compute, interpret
from dreamquant.network.live import at_once
from dreamquant.quantization.batchnorm import grids_from_batchnorm
from dreamquant.quantization.effect import Effect, effects, narrowed, together
from dreamquant.quantization.fixed import fixed_grid
from dreamquant.quantization.forms import activation_form
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.histogram import Tally, Values
from dreamquant.quantization.sites import score_nodes
from dreamquant.quantization.student import Student
from dreamquant.quantization.through import following_function, narrow
from dreamquant.quantization.walk import CHUNK as MOST
from dreamquant.quantization.walk import Chunks, float_tensor, quantizer_named, quantizer_of, walk

Deciders = dict[str, tuple[fx.Node, ...]]  # as from `prepare`
Find = Callable[[str, Values], Grid]


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

    def find(name: str, values: Values) -> Grid:
        fixed = fixed_grid(deciders[name], plan, widths[name], student.network.device)
        if fixed is not None:
            return fixed
        whole_form = activation_form(plan, widths[name])
        form: dict[str, Any] = {"bits": widths[name], "symmetric": whole_form.symmetric(values.ends[0])}
        whole = plan.keep_scores and any(node in scores for node in deciders[name])
        low, high = values.ends if whole else own.get(name, by_default)(values, **form)
        function = functions[name]
        if function is not None:
            low, high = narrow(values, low, high, function, **form)
        heard = [felt[node] for node in deciders[name] if node in felt]
        if plan.effect_limit is not None and heard and not whole:
            low, high = narrowed(low, high, together(heard), plan.effect_limit, **form)
        return whole_form.grid(low, high, None if whole else values)

    return find


def activation_grids(student: Student, widths: dict[str, int], deciders: Deciders, images: Tensor, find: Find) -> None:
    """Give every activation its grid: from BatchNorm statistics where the plan says so, else by `find` from the values that
    images (N, C, H, W) have there."""
    if student.plan.range_source == "batchnorm":
        set_grids(student, grids_from_batchnorm(student, widths, deciders))
    else:
        _grids_of_samples(student, images, deciders, find)


def float_values(student: Student, images: Tensor, deciders: Deciders) -> dict[str, Values]:
    """By the name of a quantizer, the values that its deciders have in the float network on images (N, C, H, W), as far as they
    depend on the images. The network runs twice, a few images at a time: to see where values end, and to count them between."""
    graph, network = student.network.graph, student.network
    fixed = constants(graph.graph)
    tallies = {name: Tally(len(nodes)) for name, nodes in deciders.items() if fixed.isdisjoint(nodes)}
    places = [(node, name, place) for name in tallies for place, node in enumerate(deciders[name])]
    pieces = in_pieces(images, network.batch, at_once(network, MOST), network.device)

    def step(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return float_tensor(graph, node)
        return values[node.all_input_nodes[0]] if node.op == "call_module" else compute(graph, node, values)

    def run(look: Callable[[Tally, int, Tensor], None], watched: Iterable[tuple[fx.Node, str, int]]) -> None:
        at: dict[fx.Node, list[tuple[Tally, int]]] = {}
        for node, name, place in watched:
            at.setdefault(node, []).append((tallies[name], place))

        def after(node: fx.Node, value: Any) -> Any:
            for tally, place in at.get(node, ()):
                look(tally, place, value)
            return value

        with torch.no_grad():
            for piece in pieces if at else ():
                interpret(graph, piece, step=step, after=after)

    run(Tally.see, places)
    run(lambda tally, _, value: tally.count(value), [one for one in places if tallies[one[1]].again])
    return {name: tally.values() for name, tally in tallies.items()}


def _values(tensors: list[Chunks]) -> Values:
    """The values of tensors that are at hand."""
    tally = Tally(len(tensors))
    for number, chunks in enumerate(tensors):
        for chunk in chunks:
            tally.see(number, chunk)
    for chunk in (chunk for chunks in tensors if tally.again for chunk in chunks):
        tally.count(chunk)
    return tally.values()


def _grids_of_samples(student: Student, images: Tensor, deciders: Deciders, find: Find) -> None:
    """Find every activation grid: on the float network's values or, in one walk, on the quantized prefix's.

    On the latter a grid that is shared is found where the last of its deciders is computed; tensors that come before are float
    until then.
    """
    graph = student.network.graph
    if student.plan.observe == "float":
        set_grids(student, {name: find(name, values) for name, values in float_values(student, images, deciders).items()})
        return
    waiting = {name: {node.name for node in nodes} for name, nodes in deciders.items()}
    seen: dict[str, list[Chunks]] = {name: [] for name in deciders}

    def before(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:  # noqa: ARG001
        source, name = node.all_input_nodes[0].name, str(node.target)
        if source in waiting[name]:
            waiting[name].remove(source)
            seen[name].append(quantized)
            if not waiting[name]:
                quantizer_of(graph, node).grid = find(name, _values(seen.pop(name)))

    walk(student.network, images, before=before)


def set_grids(student: Student, grids: Mapping[str, Grid]) -> None:
    """Put grids in, by their quantizers' names."""
    for name, grid in grids.items():
        quantizer_named(student.network.graph, name).grid = grid
