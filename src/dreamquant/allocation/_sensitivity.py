"""Sensitivity: how far single quantizers, each alone in an otherwise float network, move what the network says.

The measure of ZeroQ's mixed precision (Cai et al., CVPR 2020, eq. 4) and of RSD's hybrid quantization (GVSL, Kumar et al., 2020,
algorithm 2): the mean Kullback-Leibler divergence of the changed network's softmax from the float one's, in nats; of outputs
that are no classes their own `distance`, and of several outputs the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.mapped import Pieces
from dreamquant.network.answers import distances, spreads
from dreamquant.network.graph import Network, by_image, whole_batches
from dreamquant.network.interpreter import Values, interpret
from dreamquant.network.live import at_once
from dreamquant.network.operators import data_inputs
from dreamquant.network.scores import float_answers
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.moves import is_passthrough
from dreamquant.quantization.plan import Plan, change_plan, load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.quantization.student import Student, prepare, quantizer_nodes, weight_quantizer
from dreamquant.quantization.walk import CHUNK, quantizer_named, with_grids
from dreamquant.samples import Samples

Callback = Callable[[int, int], None]  # (steps done, steps in all)
Change = Mapping[str, Grid | Codebook]  # by the quantizer's name: the grids that are put in, all others being left out


@dataclass(frozen=True)
class LayerDamage:
    """Divergences from the float network, in nats, with nothing quantized but the layer's weights, or but its input.

    A layer whose input the plan does not quantize has 0 there.
    """

    layer: str
    weights: float
    activations: float

    @property
    def both(self) -> float:
        return self.weights + self.activations


@dataclass(frozen=True)
class LayerGrids:
    """The grids of a layer's weights and of its input (none where the plan leaves it float)."""

    weights: Change
    inputs: Change


def sensitivities(
    network: Network, samples: Samples, plan: str | Plan = "deploy", bits: str = "W8A8", callback: Callback | None = None
) -> list[LayerDamage]:
    """What each layer's weights and each layer's input cost when nothing else is quantized, in the order of the graph.

    Grids are those of `plan` and `bits`, ranges being found on the float network. Layers that share an input share its number;
    layers that the plan leaves float are left out. Raises what `quantize` raises.
    """
    chosen = load_plan(plan) if isinstance(plan, str) else plan
    layers = layer_grids(lone_student(network, samples, chosen, bits))
    changes = {tuple(change): change for grids in layers.values() for change in (grids.weights, grids.inputs)}
    found = damages(network, samples, chosen, bits, list(changes.values()), callback)
    cost = dict(zip(changes, found, strict=True))
    return [LayerDamage(name, cost[tuple(grids.weights)], cost[tuple(grids.inputs)]) for name, grids in layers.items()]


def lone_student(network: Network, samples: Samples, plan: Plan, bits: str) -> Student:
    """The student whose grids are those of single changes: ranges of the float network, and no bias that makes up for others."""
    return quantize(network, samples, bits=bits, plan=change_plan(plan, observe="float", bias_correction="none"))


def layer_grids(student: Student) -> dict[str, LayerGrids]:
    """By layer, in the order of the graph, the grids of its weights and of its input; layers left float are left out."""
    grids = {str(tensor.quantizer.target): tensor.grid for tensor in student.tensors()}
    found = {}
    for layer in student.network.graph.graph.nodes:
        weight = weight_quantizer(layer)
        if weight is not None:
            inputs = {name: grids[name] for name in _input_quantizers(layer) if name in grids}
            found[layer.name] = LayerGrids({str(weight.target): grids[str(weight.target)]}, inputs)
    return found


def _input_quantizers(layer: fx.Node) -> list[str]:
    """The quantizers of the tensor that enters a layer, and of those that it is a mere rearrangement of."""
    names, node = [], layer.args[0]
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            names.append(str(node.target))
            node = node.all_input_nodes[0]
        elif is_passthrough(node):
            node = data_inputs(node)[0]
        else:
            break
    return names


def damages(
    network: Network,
    samples: Samples,
    plan: Plan,
    bits: str,
    changes: Sequence[Change],
    callback: Callback | None = None,
) -> list[float]:
    """The divergence that each change does alone, in nats, in the order of `changes`.

    The network is that which `plan` and `bits` quantize, with no grid but those of one change at a time. The float values of
    all nodes are kept, for as many images at once as `at_once` says, and only what follows the change is computed again.
    Raises `ModelError` where divergences are not finite.
    """
    student, _, _ = prepare(network, plan, parse_bits(bits))
    graph, batch = student.network.graph, network.batch
    later = [_later(graph.graph, change) for change in changes]
    pieces = Pieces(samples.images, at_once(student.network, CHUNK, kept=True))
    sums = [0.0] * len(changes)
    outputs, variances = network.outputs, spreads(network.outputs, float_answers(network, samples.images))

    def answers(result: Any, filled: int, count: int) -> list[Tensor]:
        return [value[:count] for value in by_image(result, outputs, filled)]

    with torch.no_grad():
        for number, piece in enumerate(pieces):
            images = whole_batches(piece, batch).to(network.device)
            values: Values = {}
            expected = answers(interpret(graph, images, values=values, keep=True), len(images), len(piece))
            for index, change in enumerate(changes):
                with with_grids({quantizer_named(graph, name): grid for name, grid in change.items()}):
                    kept = {node: value for node, value in values.items() if node not in later[index]}
                    actual = answers(interpret(graph, images, values=kept), len(images), len(piece))
                sums[index] += len(piece) * distances(outputs, expected, actual, variances)
                if callback is not None:
                    callback(number * len(changes) + index + 1, len(pieces) * len(changes))
    if not all(map(math.isfinite, sums)):
        raise ModelError("the network's answers to the samples are not finite numbers; no layer can be told from another by them")
    return [total / len(samples) for total in sums]


def _later(graph: fx.Graph, change: Change) -> set[fx.Node]:
    """The quantizers of a change and everything that depends on them."""
    found = {node for node in quantizer_nodes(graph) if node.target in change}
    for node in graph.nodes:
        if node.op == "output" or any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def quantized_layers(network: Network, plan: Plan) -> list[str]:
    """The layers that `plan` quantizes, in the order of the graph."""
    return [node.name for node in weighted_nodes(network.graph.graph) if not plan.layer(node.name).keep_float]


def with_layers(plan: Plan, choices: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with some fields of single layers (`LayerPlan`) changed."""
    layers = {name: plan.layer(name).model_dump() | dict(fields) for name, fields in choices.items()}
    return change_plan(plan, layers={**plan.layers, **layers})


def whole_divergence(student: Student, expected: list[Tensor], images: Tensor) -> float:
    """What all of a student's quantizers do together on images (N, C, H, W), from the float answers `expected`, in nats."""
    return distances(student.network.outputs, expected, float_answers(student.network, images))


def sharing(names: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Layers in groups: those that share a quantizer (`names` by layer), directly or through others, take one decision."""
    groups: list[tuple[list[str], set[str]]] = []
    for layer, quantizers in names.items():
        met = [group for group in groups if group[1] & set(quantizers)]
        groups = [group for group in groups if group not in met]
        groups.append(([*(one for group in met for one in group[0]), layer], set(quantizers).union(*(group[1] for group in met))))
    order = {layer: index for index, layer in enumerate(names)}
    return sorted((sorted(layers, key=order.__getitem__) for layers, _ in groups), key=lambda layers: order[layers[0]])
