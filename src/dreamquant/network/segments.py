"""Segments: the pieces of a network between two points where all data flows through one tensor.

A residual block comes out as one segment in any network, whatever its classes are called. A cut is made as late as
possible, just before the next layer with weights, so that BatchNorm, activation and pooling stay with their layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dreamquant.network.graph import Network, output_nodes
from dreamquant.network.operators import PRODUCTS, WEIGHTED, data_nodes, data_users, is_call


@dataclass(frozen=True)
class Segment:
    """`nodes` compute the tensor `output` from the tensor `input` (and stored ones)."""

    input: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def layers(self) -> list[fx.Node]:
        """The nodes with weights."""
        return [node for node in self.nodes if is_call(node, WEIGHTED)]


def segments(network: Network) -> list[Segment]:
    """The segments of a network, in order."""
    nodes = data_nodes(network.graph.graph)
    found: list[Segment] = []
    start, source = 1, nodes[0]
    for cut in _cuts(network.graph.graph, nodes):
        piece = nodes[start : cut + 1]
        joins = not any(is_call(node, WEIGHTED | PRODUCTS) for node in piece)
        if found and joins:
            found[-1] = Segment(found[-1].input, found[-1].nodes + tuple(piece))
        elif not joins:
            found.append(Segment(source, tuple(piece)))
        else:
            continue  # nothing with weights yet: the piece joins the first segment
        start, source = cut + 1, nodes[cut]
    return found


def _cuts(graph: fx.Graph, nodes: list[fx.Node]) -> list[int]:
    """Positions after which `nodes[position]` is the only tensor that is still needed; sizes taken of others do not count."""
    position = {node: index for index, node in enumerate(nodes)}
    results = set(output_nodes(graph))
    end = len(nodes)
    last_use = [
        end if node in results else max((position.get(user, index) for user in data_users(node)), default=index)
        for index, node in enumerate(nodes)
    ]
    cuts, furthest = [], 0
    for index in range(len(nodes)):
        if index and furthest <= index and last_use[index] > index:
            cuts.append(index)
        furthest = max(furthest, last_use[index])
    return cuts
