"""The front of a graph: inside, images are float32 (N, C, H, W), whatever layout and number type the file takes them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from dreamquant.network.graph import aten, input_node, is_input

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def channels_first(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    """(C, H, W) of one image that a file has in `layout`."""
    one, two, three = shape
    return (three, one, two) if layout == "NHWC" else (one, two, three)


def as_fed(images: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """Images (N, C, H, W) in a file's layout and number type."""
    moved = images.permute(TO_LAST).contiguous() if layout == "NHWC" else images
    return moved.round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else moved.to(dtype)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that do not depend on the image."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not is_input(node) and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def turns_channels_first(graph: fx.Graph) -> bool:
    """Whether the image's first operations, its casts and its sums and products with constants left out, move channels from the
    last axis to the first."""
    node, fixed = input_node(graph), constants(graph)
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is aten.permute.default:
            return list(node.args[1]) == TO_FIRST  # type: ignore[arg-type]
        others = [source for source in node.all_input_nodes if source not in fixed]
        if node.op != "call_function" or len(others) != 1 or len(node.args) > 3:
            return False
    return False


def take_channels_first(graph: fx.GraphModule) -> None:
    """Make a graph of images (N, H, W, C) one of images (N, C, H, W), in place: the graph's own permutation of its input is left
    out where that undoes it, and one is put in where there is none."""
    image, nodes = input_node(graph.graph), graph.graph
    readers = list(image.users)
    undone = [node for node in readers if node.target is aten.permute.default and list(node.args[1]) == TO_FIRST]  # type: ignore[arg-type]
    for node in undone:
        node.replace_all_uses_with(image)
        nodes.erase_node(node)
    if len(undone) < len(readers):
        with nodes.inserting_after(image):
            moved = nodes.call_function(aten.permute.default, (image, TO_LAST))
        for node in readers:
            if node not in undone:
                node.replace_input_with(image, moved)
    graph.recompile()


def take_float32(graph: fx.GraphModule) -> None:
    """Make a graph that computes in float32 take float32 images and store float32 numbers, in place."""
    graph.float()
    for node in list(graph.graph.nodes):
        casts_image = node.target is aten._to_copy.default and is_input(node.args[0])
        if casts_image and node.kwargs.get("dtype") == torch.float32:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
