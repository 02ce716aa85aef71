"""Sites: the tensors of a graph that a plan quantizes, and which of them share one grid.

Every grid has a level at zero. So zeros that the layer behind can add itself (`merged_padding`) need no grid of their own: what
they surround has one, and the layer reads its levels and exact zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dreamquant.network.graph import aten, is_input
from dreamquant.network.notes import notes, shape_of
from dreamquant.network.operators import (
    CLIPPING,
    CONVOLUTIONS,
    INTEGER_CAPABLE,
    LINEARS,
    PARTIAL,
    PRODUCTS,
    TRANSPOSED,
    WEIGHTED,
    argument,
    data_inputs,
    data_nodes,
    is_call,
    unquantized,
)
from dreamquant.network.padding import merged_padding
from dreamquant.network.pairs import groups_of
from dreamquant.quantization.fixed import fixed_form, shared_form
from dreamquant.quantization.moves import is_passthrough, moves, unmoved
from dreamquant.quantization.plan import LARGEST_BITS, Bits, Plan, Tie

ACTIVATION_FUNCTIONS = CLIPPING | {
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
}
UNMERGED = ACTIVATION_FUNCTIONS - CLIPPING  # no integer runtime merges these into the convolution before them
COMPUTE = WEIGHTED | PRODUCTS
POOLINGS: set[Any] = {
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
}
TIED: dict[Tie, set[Any]] = {
    "moves": set(),  # see `is_passthrough`
    "concat": {aten.cat.default},
    "average": {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim},
    "resize": {aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec},
    "elementwise": set(),  # their sides, not what they give
}
SIDES: set[Any] = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
}
TWO_SIDED = {aten.add.Tensor, aten.mul.Tensor}


@dataclass(frozen=True)
class Site:
    """An activation to quantize: after `node`, for `users`, on the grid found from the values of `deciders` (often `node` alone).

    `name` is the grid's: sites of the same deciders and as many bits share it. It is called after the first of them, `root`.
    One `behind` another of the same tensor takes what that gives: its readers share a grid, and the plan fixes another.
    """

    node: fx.Node
    deciders: tuple[fx.Node, ...]
    bits: int
    users: tuple[fx.Node, ...]
    name: str
    behind: bool = False

    @property
    def root(self) -> fx.Node:
        """The first decider."""
        return self.deciders[0]


def activation_sites(graph: fx.Graph, plan: Plan, bits: Bits) -> list[Site]:
    """The activations that `plan` quantizes, in the order of the graph."""
    nodes = data_nodes(graph)
    wanted = PLACEMENTS[plan.placement](nodes, plan)
    wanted -= {node for node in wanted if _cannot_be_quantized(node) or _only_for_float_layers(node, plan)}
    if not plan.quantize_image:
        wanted -= {node for node in wanted if is_input(unmoved(node))}
    wanted -= {node for node in wanted if merged_padding(node) is not None and data_inputs(node)[0] in wanted}
    ordered = [node for node in nodes if node in wanted]
    shared = plan.placement in ("integer", "inputs", "every_tensor")
    groups = _groups(ordered, plan) if shared else {node: (node,) for node in ordered}
    sources = [(layer, _sources(layer)) for layer in weighted_nodes(graph)]
    width = {node: _bits(node, sources, plan, bits) for node in ordered}
    widest: dict[tuple[fx.Node, ...], int] = {}
    for node, deciders in groups.items():
        widest[deciders] = max(widest.get(deciders, 0), width[node])
    alone = Counter(groups.values())
    return [site for node in ordered for site in _sites(node, groups[node], widest[groups[node]], plan, alone[groups[node]] == 1)]


def worthwhile(sites: list[Site], float_tensors: Collection[str]) -> list[Site]:
    """The sites that are left where some tensors, named by their grids, stay in float.

    With them go those that no operation computes in integers any more, neither what makes the tensor nor what reads it: there a
    grid costs time and accuracy, and earns nothing.
    """
    kept = [site for site in sites if site.name not in float_tensors]
    while len(kept) < len(sites):
        read = {(site.node, user) for site in kept for user in site.users}
        given = {site.node for site in kept}
        useful = [site for site in kept if _runs_in_integers(_maker(site.node), read, given) or _is_read(site, read, given)]
        if len(useful) == len(kept):
            break
        kept = useful
    return kept


def _runs_in_integers(node: fx.Node, read: Collection[tuple[fx.Node, fx.Node]], given: Collection[fx.Node]) -> bool:
    """Whether an operation has an integer form, and all that this asks for on grids: (tensor, reader) in `read`, `given`."""
    if moves(node) or not (is_call(node, COMPUTE) or _integer_capable(node)):
        return False
    return all(_is_on_grid(source, node, read) for source in data_inputs(node)) and (
        merged_result(node) in given or is_call(node, LINEARS | PRODUCTS)
    )


def _is_on_grid(source: fx.Node, reader: fx.Node, read: Collection[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a reader finds a tensor on a grid, its own or that of what it rearranges."""
    while (source, reader) not in read and is_passthrough(source):
        source, reader = data_inputs(source)[0], source
    return (source, reader) in read


def _maker(node: fx.Node) -> fx.Node:
    """The operation that a tensor's values come of."""
    while is_passthrough(node) or is_call(node, CLIPPING):
        node = data_inputs(node)[0]
    return node


def _is_read(site: Site, read: Collection[tuple[fx.Node, fx.Node]], given: Collection[fx.Node]) -> bool:
    """Whether an operation that reads a site's tensor, or what merely moves its values, runs in integers."""
    waiting = list(site.users)
    while waiting:
        user = waiting.pop()
        if _runs_in_integers(user, read, given):
            return True
        waiting += user.users if moves(user) else ()
    return False


def _cannot_be_quantized(node: fx.Node) -> bool:
    """Whether a tensor has no name in the file, or holds other numbers than float32."""
    return notes(node).inner or notes(node).dtype != torch.float32


def _sites(node: fx.Node, deciders: tuple[fx.Node, ...], bits: int, plan: Plan, alone: bool) -> list[Site]:
    """A tensor's site, or two where readers without weights have more bits than the rest of its readers.

    One that is not `alone` on its grid holds values that were put there already, or will be, and has no bits to give.
    """
    users = [user for user in node.users if plan.placement != "inputs" or _reads_integers(user, node, plan)]
    wide = tuple(user for user in users if _is_elementwise(user)) if alone and (plan.elementwise_bits or 0) > bits else ()
    rest = tuple(user for user in users if user not in wide)
    name = deciders[0].name
    found = [Site(node, deciders, plan.elementwise_bits or bits, wide, f"{name}_elementwise_grid")] if wide else []
    if fixed_form(node, plan, bits) is not None and shared_form(deciders, plan, bits) is None:
        found = [Site(node, (node,), bits, rest, f"{node.name}_fixed_grid")]
        return [*found, Site(node, deciders, bits, rest, f"{name}_grid", behind=True)]
    return [*found, Site(node, deciders, bits, rest, f"{name}_grid")] if rest or not wide else found


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a node computes each value from those at its place, with no weight, and no layer before it can merge it in."""
    return is_call(node, UNMERGED) or (is_call(node, TWO_SIDED) and len(data_inputs(node)) == 2)


def _is_residual_add(node: fx.Node) -> bool:
    return is_call(node, {aten.add.Tensor}) and len(data_inputs(node)) == 2


def weighted_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The layers whose weights are stored tensors, in order."""
    return [
        node
        for node in data_nodes(graph)
        if is_call(node, WEIGHTED) and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    ]


def score_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that reach the outputs through no further layer: class scores are such, and clipping them costs certainty."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(user in found and not is_call(user, COMPUTE) for user in node.users):
            found.add(node)
    return found


def _activation_outputs(nodes: list[fx.Node], plan: Plan) -> set[fx.Node]:  # noqa: ARG001
    """The outputs of activation functions: the protocol of ZeroQ and its family (papers.md 0.4)."""
    return {node for node in nodes if is_call(node, ACTIVATION_FUNCTIONS)}


def _computes(node: object, plan: Plan) -> bool:
    """Whether a node is a layer or product that is to run in integers."""
    return isinstance(node, fx.Node) and is_call(node, COMPUTE) and not stays_float(node, plan)


def stays_float(layer: fx.Node, plan: Plan) -> bool:
    """Whether the plan leaves a layer in float: by its name, or as one of too few channels."""
    return plan.layer(layer.name).keep_float or (is_call(layer, CONVOLUTIONS) and too_small(layer, plan.float_below_channels))


def too_small(layer: fx.Node, channels: int) -> bool:
    """Whether a convolution has too few channels to be faster in integers than in float: fewer than so many, a tile of a tensor
    core, on one side. Not where they fill half a tile: channels in multiples of 8 under a square kernel, with as many as a tile
    on the other side, or in the first layer; in groups, output channels in multiples of 8 under a kernel of 3 or more (NVIDIA
    ModelOpt, `find_nodes_from_convs_to_exclude`)."""
    weight = shape_of(layer.args[1])
    transposed, first = layer.target in TRANSPOSED, is_input(unquantized(argument(layer, 0)))
    return few_channels(weight, groups_of(layer), channels, transposed=transposed, first=first)


def few_channels(weight: Sequence[int], groups: int, channels: int, *, transposed: bool, first: bool) -> bool:
    """The same of a weight of this shape."""
    given, taken = (weight[1] * groups, weight[0]) if transposed else (weight[0], weight[1] * groups)
    if min(given, taken) >= channels:
        return False
    if groups > 1:
        return given % 8 > 0 or min(weight[2:]) < 3
    square = len(set(weight[2:])) == 1
    return not (square and (given % 8 == 0 or taken % 8 == 0) and (first or max(given, taken) >= channels))


def _only_for_float_layers(node: fx.Node, plan: Plan) -> bool:
    """Whether a tensor, or what merely rearranges it, is read by layers that stay in float and by nothing else."""
    users = list(node.users)
    return bool(users) and all(
        _only_for_float_layers(user, plan) if is_passthrough(user) else stays_float(user, plan) for user in users
    )


def _layer_inputs(nodes: list[fx.Node], plan: Plan) -> set[fx.Node]:
    """The inputs of layers and the identity side of residual adds: the protocol of BRECQ and its family."""
    wanted = {source for node in nodes if _computes(node, plan) for source in data_inputs(node)}
    for node in nodes:
        if _is_residual_add(node):
            wanted |= {source for source in data_inputs(node) if not is_call(source, WEIGHTED | {aten.batch_norm.default})}
    return {node for node in wanted if not _rearranges(node, wanted)}


def _rearranges(node: fx.Node, wanted: set[fx.Node]) -> bool:
    """Whether a tensor only rearranges one that is quantized anyway, and so stands on its grid already."""
    while is_passthrough(node):
        node = data_inputs(node)[0]
        if node in wanted:
            return True
    return False


def _reads_integers(user: fx.Node, source: fx.Node, plan: Plan) -> bool:
    """Whether an operation is to read a tensor from a grid where inputs alone are on one: layers, products and poolings are, and
    sums of two tensors for the side that no layer gives, so that a runtime can add to the layer's own sums."""
    if _is_residual_add(user):
        return not is_call(source, WEIGHTED | {aten.batch_norm.default})
    return _computes(user, plan) or is_call(user, POOLINGS)


def _inputs(nodes: list[fx.Node], plan: Plan) -> set[fx.Node]:
    """What is read so."""
    return {source for node in nodes for source in data_inputs(node) if _reads_integers(node, source, plan)}


def _every_tensor(nodes: list[fx.Node], plan: Plan) -> set[fx.Node]:  # noqa: ARG001
    """All tensors but those between an operation and the clipping that it is merged with."""
    return {node for node in nodes if is_input(node) or merged_result(node) is node}


def constant_sites(graph: fx.Graph, plan: Plan) -> dict[fx.Node, list[fx.Node]]:
    """With every tensor the stored ones that meet activations, those of layers with weights and of BatchNorms left out, and what
    reads them."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in data_nodes(graph) if plan.placement == "every_tensor" else ():
        if not is_call(node, WEIGHTED | {aten.batch_norm.default}):
            for source in node.all_input_nodes:
                if source.op == "get_attr" and notes(source).dtype == torch.float32:
                    found.setdefault(source, []).append(node)
    return found


def _integer(nodes: list[fx.Node], plan: Plan) -> set[fx.Node]:
    """Every tensor on a path of operations that a runtime can compute in integers, up to the last layer's input."""
    feeds = _feeds_compute(nodes, plan)
    wanted: set[fx.Node] = set()
    for node in nodes:
        result = merged_result(node)
        if _computes(node, plan):
            wanted.update(data_inputs(node))
            if feeds[result] or is_call(node, CONVOLUTIONS):
                wanted.add(result)
        elif _integer_capable(node) and feeds[node]:
            wanted.update(data_inputs(node))
            wanted.add(result)
    for node in reversed(nodes):  # what only passes values on is on a grid where its input is
        if node in wanted and is_passthrough(node):
            wanted.update(data_inputs(node))
    for node in nodes:
        if is_passthrough(node) and feeds[node] and any(source in wanted for source in data_inputs(node)):
            wanted.add(node)
    if plan.merge_activations:
        wanted -= {node for node in wanted if is_call(node, CONVOLUTIONS) and _only_feeds_unmerged(node)}
    return wanted


PLACEMENTS: dict[str, Callable[[list[fx.Node], Plan], set[fx.Node]]] = {
    "integer": _integer,
    "activation_outputs": _activation_outputs,
    "layer_inputs": _layer_inputs,
    "inputs": _inputs,
    "every_tensor": _every_tensor,
}


def _integer_capable(node: fx.Node) -> bool:
    if is_call(node, TWO_SIDED):
        return len(data_inputs(node)) == 2 and not any(argument.op == "get_attr" for argument in node.all_input_nodes)
    return is_call(node, INTEGER_CAPABLE)


def merged_result(node: fx.Node) -> fx.Node:
    """The tensor that leaves a layer with the clipping activation that follows it merged in."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and is_call(user, CLIPPING) else node


def _feeds_compute(nodes: list[fx.Node], plan: Plan) -> dict[fx.Node, bool]:
    """Whether a layer or product is reached from a node through integer-capable operations only."""
    feeds: dict[fx.Node, bool] = {}
    for node in reversed(nodes):
        feeds[node] = any(
            _computes(user, plan)
            or ((_integer_capable(user) or is_passthrough(user) or is_call(user, CLIPPING)) and feeds.get(user, False))
            for user in node.users
        )
    return feeds


def _only_feeds_unmerged(node: fx.Node) -> bool:
    """Whether a convolution's result goes nowhere but into an activation function (x * sigmoid(x) counts as one)."""
    functions = [user for user in node.users if is_call(user, UNMERGED)]
    products = [user for user in node.users if is_call(user, {aten.mul.Tensor})]
    gates = all(any(argument in functions for argument in product.all_input_nodes) for product in products)
    return bool(functions) and gates and len(functions) + len(products) == len(node.users)


def _groups(sites: list[fx.Node], plan: Plan) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each site the nodes whose values decide its grid: sites that the plan's `ties` join share one."""
    tied = set().union(*(TIED[tie] for tie in plan.ties))
    parent = {node: node for node in sites}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in sites:
        if ("moves" in plan.ties and is_passthrough(node)) or is_call(node, tied):
            for source in data_inputs(node):
                if source in parent:
                    parent[find(source)] = find(node)
    for node in data_nodes(sites[0].graph) if sites and "elementwise" in plan.ties else ():
        sides = [source for source in data_inputs(node) if source in parent] if is_call(node, SIDES) else []
        for source in sides[1:]:
            parent[find(source)] = find(sides[0])
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in sites:
        groups.setdefault(find(node), []).append(node)
    return {node: deciders for members in groups.values() for deciders in [_deciders(members)] for node in members}


def _deciders(members: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Of tensors on one grid the last concatenation, or else the first tensor, and each that adds values which that lacks."""
    held: dict[fx.Node, set[fx.Node]] = {}  # the tensors whose values a member has, all of them
    for node in members:
        joins = is_call(node, {aten.cat.default})
        sources = [source for source in data_inputs(node) if source in held] if joins or is_passthrough(node) else []
        whole = not is_call(node, PARTIAL)
        held[node] = set().union(*(held[source] for source in sources if whole))
        if not sources or (joins and len(sources) < len(node.all_input_nodes)):
            held[node].add(node)
    root = next((node for node in reversed(members) if is_call(node, {aten.cat.default})), members[0])
    first = set().union(*held.values()) - held[root]
    return (root, *(node for node in members if node in first))


def _bits(node: fx.Node, sources: list[tuple[fx.Node, set[fx.Node]]], plan: Plan, bits: Bits) -> int:
    widths = [plan.layer(layer.name).input_bits for layer, read in sources if node in read]
    if any(widths):
        return max(width or bits.activations for width in widths)
    if bits.activations > LARGEST_BITS:  # more than any exception gives
        return bits.activations
    if is_input(node):
        return plan.image_bits or bits.activations
    if plan.last_input_bits and sources and node in sources[-1][1]:
        return plan.last_input_bits
    if plan.second_input_bits and len(sources) > 1 and node in sources[1][1]:
        return plan.second_input_bits
    return bits.activations


def _sources(layer: fx.Node) -> set[fx.Node]:
    """The tensor that enters a layer, and those that it is a mere rearrangement of."""
    found = set(data_inputs(layer)[:1])
    node = data_inputs(layer)[0]
    while is_passthrough(node):
        node = data_inputs(node)[0]
        found.add(node)
    return found
