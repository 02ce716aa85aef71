"""How much memory one run of a graph takes, by arithmetic."""

from __future__ import annotations

import math

from torch import fx

from dreamquant.errors import OptionError
from dreamquant.limits import check_memory
from dreamquant.network.graph import Network, input_node

COPIES = 2  # of what is alive: the runtime's beside ours, or a quantized value beside the float one


def live_bytes(graph: fx.GraphModule) -> int:
    """Bytes of all values that are alive at once where a run of the graph needs most, at the batch its shapes were recorded on.

    Views take none, and neither do stored tensors, which are there already.
    """
    last_use = {argument: node for node in graph.graph.nodes for argument in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last_use.items():
        ends.setdefault(node, []).append(value)
    alive = most = 0
    for node in graph.graph.nodes:
        alive += _size(node)
        most = max(most, alive)
        alive -= sum(map(_size, ends.get(node, ())))
    return COPIES * most


def _size(node: fx.Node) -> int:
    if node.op == "get_attr" or "shape" not in node.meta or _is_view(node):
        return 0
    size: int = math.prod(node.meta["shape"]) * node.meta["dtype"].itemsize
    return size


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def check_run(network: Network, images: int) -> None:
    """`OptionError` where a run over so many images, all of them at every node, takes more memory than the limit."""
    recorded = input_node(network.graph.graph).meta["shape"][0]
    what = f"{network.source.text} on {images} images {network.input_shape}"
    check_memory(live_bytes(network.graph) * images // recorded, what, OptionError)
