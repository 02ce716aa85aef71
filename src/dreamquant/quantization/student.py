"""`Student`: the network with explicit fake-quantizers in its graph. What it computes is what the exported file computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError, unknown
from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.network.notes import Kind, Notes, notes, set_notes
from dreamquant.network.opaque import float_operators
from dreamquant.network.operators import WEIGHTED, argument, bias_node, data_nodes, is_call
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import FakeQuantize, Grid
from dreamquant.quantization.plan import LARGEST_BITS, Bits, Plan, change_plan
from dreamquant.quantization.separate import separate
from dreamquant.quantization.sites import activation_sites, constant_sites, stays_float, weighted_nodes, worthwhile
from dreamquant.quantization.walk import quantizer_of


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor of a student that stands on a grid: `node` is quantized, `quantizer` is the node that does it."""

    node: fx.Node
    quantizer: fx.Node
    kind: Kind
    grid: Grid | Codebook


@dataclass(frozen=True)
class Student:
    """A quantized network; `network.graph` holds `FakeQuantize` modules behind every quantized tensor."""

    network: Network
    plan: Plan
    bits: Bits

    def __call__(self, images: Tensor) -> Tensor:
        """The student's first output on images (N, C, H, W)."""
        with torch.no_grad():
            return self.network(images)

    def to(self, device: torch.device) -> Student:
        """The same student with its tensors on a device."""
        return replace(self, network=self.network.to(device))

    def answers(self, images: Tensor) -> list[Tensor]:
        """All of the student's outputs on images (N, C, H, W), each (N, ...)."""
        with torch.no_grad():
            return self.network.answers(images)

    def tensors(self) -> list[QuantizedTensor]:
        """Everything that is quantized, in the order of the graph."""
        found = []
        for node in quantizer_nodes(self.network.graph.graph):
            kind, grid = notes(node).kind, quantizer_of(self.network.graph, node).grid
            if kind is not None and grid is not None:
                found.append(QuantizedTensor(node.all_input_nodes[0], node, kind, grid))
        return found

    def float_layers(self) -> list[str]:
        """The layers whose weights were left in float, stored or computed, those that read no quantizer;
        and what of the network's file stays as it is."""
        layers = [node for node in data_nodes(self.network.graph.graph) if is_call(node, WEIGHTED)]
        left = [node.name for node in layers if isinstance(node.args[1], fx.Node) and node.args[1].op != "call_module"]
        return left + float_operators(self.network)


def quantizer_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The `call_module` nodes that run quantizers."""
    return [node for node in graph.nodes if node.op == "call_module" and notes(node).kind is not None]


def weight_quantizer(layer: fx.Node) -> fx.Node | None:
    """The node that puts a layer's weight on its grid; None where the weight is float, or there is none."""
    weight = layer.args[1] if is_call(layer, WEIGHTED) else None
    return weight if isinstance(weight, fx.Node) and notes(weight).kind == "weight" else None


def prepare(network: Network, plan: Plan, bits: Bits) -> tuple[Student, dict[str, int], dict[str, tuple[fx.Node, ...]]]:
    """A student whose quantizers are in place but have no grids yet, so that it still computes the float function.

    Returns also, by the quantizer's name, its bits and, for activations, the nodes whose values decide its grid.
    """
    network = transformed(network, plan, bits)
    graph = network.graph
    layers = weighted_nodes(graph.graph)
    check_layers(network, plan)
    sites = activation_sites(graph.graph, plan, bits)
    anyhow = activation_sites(graph.graph, change_plan(plan, layers={}), bits) if plan.layers else []
    _check_tensors(plan, {site.name for site in (*sites, *anyhow)})  # a layer that is left float may take its tensors along
    sites = worthwhile(sites, plan.float_tensors)
    widths: dict[str, int] = {}
    deciders: dict[str, tuple[fx.Node, ...]] = {}
    before: dict[fx.Node, fx.Node] = {}
    for site in sites:
        widths[site.name], deciders[site.name] = site.bits, site.deciders
        source = before[site.node] if site.behind else site.node
        before[site.node] = _insert(graph, source, site.name, "activation", users=site.users)
    for index, layer in enumerate(layers):
        if stays_float(layer, plan):
            continue
        few = bits.weights <= LARGEST_BITS  # more than any exception gives
        special = {0: plan.first_weight_bits, len(layers) - 1: plan.last_weight_bits} if few else {}
        weight = argument(layer, 1)
        name = f"{weight.target}_grid"
        widths[name] = max(widths.get(name, 0), plan.layer(layer.name).weight_bits or special.get(index) or bits.weights)
        _insert(graph, weight, name, "weight", users=[layer])
        bias = bias_node(layer)
        if plan.bias != "float" and plan.weight_levels == "uniform" and bias is not None:
            _insert(graph, bias, f"{layer.name}_bias_grid", "bias", users=[layer])
    for constant, users in constant_sites(graph.graph, plan).items():
        name = f"{constant.target}_constant_grid"
        widths[name] = bits.activations
        _insert(graph, constant, name, "constant", users=users)
    graph.graph.lint()
    graph.recompile()
    return Student(network, plan, bits), widths, deciders


def _check_tensors(plan: Plan, known: set[str]) -> None:
    """`OptionError` where the plan has something for a tensor that would not be quantized."""
    for name in [*plan.float_tensors, *plan.tensor_ranges]:
        if name not in known:
            raise OptionError(unknown("tensor", name, sorted(known)))


def check_layers(network: Network, plan: Plan) -> None:
    """`OptionError` where the plan has something for a layer that the network does not have."""
    known = [layer.name for layer in weighted_nodes(network.graph.graph)]
    for name in plan.layers:
        if name not in known:
            raise OptionError(unknown("layer", name, known))


def transformed(network: Network, plan: Plan, bits: Bits) -> Network:
    """A network of its own graph that computes the same function, in the form that `plan` quantizes."""
    network = network.with_graph(copy.deepcopy(network.graph))
    for name in plan.transforms:
        method = find_method("transform", name)
        options = method.check_options(plan.transform_options.get(name, {}))
        network = method.function(network, bits=bits.weights, **options)
    if plan.placement == "every_tensor":
        separate(network)
    return network


def _insert(graph: fx.GraphModule, node: fx.Node, name: str, kind: Kind, *, users: Iterable[fx.Node]) -> fx.Node:
    """Put the quantizer `name` between `node` and `users`."""
    if not hasattr(graph, name):
        graph.add_module(name, FakeQuantize())
    with graph.graph.inserting_after(node):
        quantizer = graph.graph.call_module(name, (node,))
    set_notes(quantizer, Notes(notes(node).shape, notes(node).dtype, kind=kind))
    for user in users:
        user.replace_input_with(node, quantizer)
    return quantizer
