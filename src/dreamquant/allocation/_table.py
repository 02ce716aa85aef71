"""The table of mixed precision: what every width of every layer costs, and what damage it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dreamquant.allocation._sensitivity import (
    Callback,
    Change,
    LayerGrids,
    damages,
    layer_grids,
    lone_student,
    quantized_layers,
    sharing,
    with_layers,
)
from dreamquant.allocation._solver import Option, Term, cost, damage, solve
from dreamquant.network.graph import Network, input_node
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import TRANSPOSED
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples

FLOAT_BITS = 32  # of an input that is not quantized


@dataclass(frozen=True)
class Width(Option):
    """An option by the bits that the plan is given for it; an input that shares a grid may get more of them."""

    bits: int


@dataclass(frozen=True)
class Decision:
    """What several layers take together, since they share it: `field` of `LayerPlan`, weights' bits or inputs'."""

    field: str
    layers: list[str]
    widths: list[Width]


@dataclass(frozen=True)
class Table:
    """What was measured. `unit` is the cost of one bit in every layer's weights, the inputs being as the plan has them;
    `counts` are parameters or multiplications, by layer."""

    decisions: list[Decision]
    terms: list[Term]
    unit: int
    counts: dict[str, int]

    def solve(self, average: float) -> list[Width] | None:
        """The best option of each decision at an average of bits; None where all cost more."""
        return solve([decision.widths for decision in self.decisions], self.terms, math.floor(average * self.unit))

    def average(self, best: Sequence[Width]) -> float:
        """The average of bits that options come to."""
        return cost(best, self.terms) / max(self.unit, 1)

    def fields(self, best: Sequence[Width]) -> dict[str, dict[str, int]]:
        """By layer, what the plan is to have for it."""
        found: dict[str, dict[str, int]] = {layer: {} for layer in self.counts}
        for decision, width in zip(self.decisions, best, strict=True):
            for layer in decision.layers:
                found[layer][decision.field] = width.bits
        return found

    def rows(self, best: Sequence[Width]) -> list[dict[str, Any]]:
        """By layer, in the order of the graph: its count, the damages at all widths (W2, W3, ..., A2, ...), the choice."""
        rows: dict[str, dict[str, Any]] = {layer: {"layer": layer, "count": count} for layer, count in self.counts.items()}
        for decision in self.decisions:
            letter = "W" if decision.field == "weight_bits" else "A"
            for layer in decision.layers:
                rows[layer].update({f"{letter}{width.bits}": width.damage for width in decision.widths})
        chosen = self.fields(best)
        return [row | chosen[layer] for layer, row in rows.items()]


def frontier(table: Table, averages: Sequence[float]) -> list[dict[str, Any]]:
    """For each average that can be kept to: the one reached, the least sum of damages (nats), and the bits of each layer."""
    solved = [(average, table.solve(average)) for average in averages]
    return [
        {"asked": average, "average": table.average(best), "damage": damage(best), "layers": table.fields(best)}
        for average, best in solved
        if best is not None
    ]


def measure(
    network: Network,
    samples: Samples,
    plan: Plan,
    bits: Bits,
    widths: Sequence[int],
    *,
    budget: str,
    activations: bool,
    callback: Callback | None = None,
) -> Table:
    """The table of a network: damages of every layer's weights at all `widths`, with `activations` of every input as well."""
    names = quantized_layers(network, plan)
    grids: list[dict[str, LayerGrids]] = []
    for width in widths:
        fields = {"weight_bits": width} | ({"input_bits": width} if activations else {})
        grids.append(layer_grids(lone_student(network, samples, with_layers(plan, dict.fromkeys(names, fields)), str(bits))))
    student = lone_student(network, samples, plan, str(bits))
    given = layer_grids(student)
    groups = [("weight_bits", group) for group in sharing({name: tuple(given[name].weights) for name in names})]
    if activations:
        inputs = {name: tuple(given[name].inputs) for name in names if given[name].inputs}
        groups += [("input_bits", group) for group in sharing(inputs)]
    changes = [[_change(field, group, one) for one in grids] for field, group in groups]
    found = iter(damages(network, samples, plan, str(bits), [change for row in changes for change in row], callback))
    decisions = []
    for (field, group), row in zip(groups, changes, strict=True):
        got = widths if field == "weight_bits" else [_bits(change) for change in row]
        decisions.append(Decision(field, group, [Width(one, next(found), bits) for one, bits in zip(got, widths, strict=True)]))
    counts = _counts(student, names, _parameters if budget == "size" else _multiplications)
    if budget == "size":
        terms = [Term(counts[decision.layers[0]], index) for index, decision in enumerate(decisions)]
        return Table(decisions, terms, sum(term.count for term in terms), counts)
    place = {(decision.field, name): index for index, decision in enumerate(decisions) for name in decision.layers}
    read = {name: counts[name] * _bits(given[name].inputs) for name in names}
    terms = []
    for name in names:
        weight, other = place["weight_bits", name], place.get(("input_bits", name))
        terms.append(Term(read[name] if other is None else counts[name], weight, other))
    return Table(decisions, terms, sum(read.values()), counts)


def _change(field: str, group: Sequence[str], grids: Mapping[str, LayerGrids]) -> Change:
    """The grids of what a group of layers shares, together."""
    return {
        key: grid
        for name in group
        for key, grid in (grids[name].weights if field == "weight_bits" else grids[name].inputs).items()
    }


def _bits(inputs: Change) -> int:
    return max((grid.bits for grid in inputs.values()), default=FLOAT_BITS)


def _counts(student: Student, names: Sequence[str], count: Callable[[fx.Node], int]) -> dict[str, int]:
    nodes = {node.name: node for node in student.network.graph.graph.nodes}
    return {name: count(nodes[name]) for name in names}


def _parameters(layer: fx.Node) -> int:
    return math.prod(shape_of(layer.args[1]))


def _multiplications(layer: fx.Node) -> int:
    """Of one image: each output value, or each input value of a transposed convolution, meets one row of the weight."""
    batch = shape_of(input_node(layer.graph))[0]
    values = math.prod(shape_of(layer.args[0] if layer.target in TRANSPOSED else layer)) // batch
    return values * math.prod(shape_of(layer.args[1])[1:])
