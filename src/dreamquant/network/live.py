"""How much memory one run of a graph takes, by arithmetic."""

from __future__ import annotations

from torch import fx

from dreamquant.errors import ModelError, OptionError
from dreamquant.limits import check_memory
from dreamquant.network.graph import Network, input_node
from dreamquant.network.notes import bytes_of, is_tensor, shape_of

LOADING = 3  # times what is alive, where a file is tried: the runtime's, ours, and what convolutions make of both on the way
WALKING = 2  # a quantized value beside the float one


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
    return most


def _size(node: fx.Node) -> int:
    if node.op == "get_attr" or not is_tensor(node) or _is_view(node):
        return 0
    return bytes_of(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def check_trial(graph: fx.GraphModule, images: int, name: str) -> None:
    """`ModelError` where a file cannot be tried on so many images within the limit of memory."""
    recorded = shape_of(input_node(graph.graph))
    what = f"{name}: a run of {images} images {tuple(recorded[1:])}"
    check_memory(LOADING * live_bytes(graph) * images // recorded[0], what, ModelError)


def check_run(network: Network, images: int) -> None:
    """`OptionError` where a run over so many images, all of them at every node, takes more memory than the limit."""
    recorded = shape_of(input_node(network.graph.graph))[0]
    what = f"{network.source.text} on {images} images {network.input_shape}"
    check_memory(WALKING * live_bytes(network.graph) * images // recorded, what, OptionError)
