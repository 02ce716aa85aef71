"""How much memory one run of a graph takes, by arithmetic."""

from __future__ import annotations

from torch import fx

from dreamquant.errors import ModelError, OptionError
from dreamquant.limits import check_memory, memory
from dreamquant.network.graph import Network, input_node
from dreamquant.network.notes import bytes_of, is_tensor, notes, shape_of

LOADING = 3  # times what is alive, where a file is tried: the runtime's, ours, and what convolutions make of both on the way
WORKING = 64 * 2**20  # bytes of values that a stage works on at once ...
PARTS = 32  # ... or such a part of the limit, where that is less
WALKING = 2  # a quantized value beside the float one


def live_bytes(graph: fx.Graph) -> int:
    """Bytes of all values that are alive at once where a run of the graph needs most, at the batch its shapes were recorded on.

    Views take none, and neither do stored tensors, which are there already.
    """
    last_use = {argument: node for node in graph.nodes for argument in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last_use.items():
        ends.setdefault(node, []).append(value)
    alive = most = 0
    for node in graph.nodes:
        alive += value_bytes(node)
        most = max(most, alive)
        alive -= sum(map(value_bytes, ends.get(node, ())))
    return most


def value_bytes(node: fx.Node) -> int:
    """Bytes that a node's value takes on the recorded batch; views and stored tensors take none."""
    if node.op == "get_attr" or not is_tensor(node) or _is_view(node):
        return 0
    return bytes_of(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def at_once(network: Network, most: int, *, kept: bool = False) -> int:
    """How many images are run at once, `most` where memory allows it: those whose values take at most `working_bytes`, what is
    alive at once or, where values are `kept` for gradients, all of them. A matter of the network alone (answers to other batches
    may differ in their last digits), unless the limit of memory is small. One image goes in whatever it takes."""
    if network.batch:
        return network.batch
    graph = network.graph
    recorded = notes(input_node(graph.graph)).shape
    if recorded is None:  # nobody has run it yet
        return most
    size = sum(map(value_bytes, graph.graph.nodes)) if kept else live_bytes(graph.graph)
    return max(1, min(most, working_bytes() * recorded[0] // max(size, 1)))


def working_bytes() -> int:
    """Bytes of values that a stage works on at once, where one image does not take more."""
    return min(WORKING, memory() // PARTS)


def check_trial(graph: fx.GraphModule, images: int, name: str) -> None:
    """`ModelError` where a file cannot be tried on so many images within the limit of memory."""
    recorded = shape_of(input_node(graph.graph))
    what = f"{name}: a run of {images} images {tuple(recorded[1:])}"
    check_memory(LOADING * live_bytes(graph.graph) * images // recorded[0], what, ModelError)


def check_run(network: Network, images: int) -> None:
    """`OptionError` where a run over so many images, all of them at every node before the next, takes more memory than
    the limit."""
    recorded = shape_of(input_node(network.graph.graph))[0]
    what = f"{network.source.text} on {images} images {network.input_shape}"
    check_memory(WALKING * live_bytes(network.graph.graph) * images // recorded, what, OptionError)
