"""Which nodes are written, and how their ONNX values are called."""

from __future__ import annotations

from torch import fx

from dreamquant.exporters.onnx_emit.builder import Builder
from dreamquant.network.graph import is_input, output_nodes
from dreamquant.network.notes import notes


def value_names(graph: fx.Graph, live: set[fx.Node], builder: Builder) -> dict[fx.Node, str]:
    """A name of its own for each live tensor: its origin if that is free, else what it is called in the graph."""
    names: dict[fx.Node, str] = {}
    results = output_nodes(graph)
    for index, node in enumerate(results):
        if node.op == "call_function" and node not in names:
            base = "output" if len(results) == 1 else f"output_{index}"
            names[node] = builder.unique(notes(node).origin or base)
    for node in graph.nodes:
        if node in live and node not in names and builder.facts[node].kind == "tensor":
            base = "input" if is_input(node) else str(node.target) if node.op == "get_attr" else node.name
            names[node] = builder.unique(notes(node).origin or base)
    return names
