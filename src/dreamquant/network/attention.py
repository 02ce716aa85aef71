"""Self-attention, found in the flat graph by what it computes: softmax(scores of computed tensors) times a computed tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.graph import Network, aten
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import PASSTHROUGH, PRODUCTS, SOFTMAX, data_nodes, is_call
from dreamquant.network.statistics import watch

WHOLE: set[Any] = {aten.scaled_dot_product_attention.default}
SCORES = PRODUCTS | {aten.baddbmm.default}
SCALING = {aten.mul, aten.div, aten.add, aten.sub, aten.where, aten.masked_fill, aten.clamp, aten.maximum}  # and masking
FEWEST_PATCHES = 3


@dataclass(frozen=True)
class Attention:
    """`output` (..., heads, tokens, channels), or (images * heads, tokens, channels), is what attention hands on.

    Tokens from `first` on are `patches` of the image; others, as a class token, stand before or behind them.
    """

    output: fx.Node
    first: int
    patches: int


def attentions(network: Network) -> list[Attention]:
    """The self-attentions of a network over at least three patches, in order.

    Both forms are known: one `scaled_dot_product_attention`, and the two products with a softmax between them that `capture`
    and ONNX files have.
    """
    nodes = data_nodes(network.graph.graph)
    computed = set(nodes)
    found = [node for node in nodes if is_call(node, WHOLE) or _is_mixing(node, computed)]
    layers = [Attention(node, *_patches(nodes, computed, shape_of(node)[-2])) for node in found]
    return [layer for layer in layers if layer.patches >= FEWEST_PATCHES]


def probe_attention(network: Network) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """A function of images that returns (scores, [what each attention hands on, as (rows, patches, channels), ...]).

    Scores are those of `watch`. Values are the mean over heads; a row is an image, or a window of one.
    """
    layers = attentions(network)
    graph = watch(network, [layer.output for layer in layers])

    def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        scores, values = graph(images)
        return scores, [_of_patches(value, layer, len(images)) for value, layer in zip(values, layers, strict=True)]

    return run


def _of_patches(value: Tensor, layer: Attention, images: int) -> Tensor:
    if value.dim() == 3:  # heads lie in the batch axis
        value = value.reshape(images, -1, *value.shape[1:])
    mean: Tensor = value.mean(-3).flatten(0, -3)[:, layer.first : layer.first + layer.patches]
    return mean


def _is_mixing(node: fx.Node, computed: set[fx.Node]) -> bool:
    """Whether a product is that of attention weights with values."""
    if not is_call(node, PRODUCTS) or node.args[1] not in computed:
        return False
    weights = _behind(node.args[0], lambda one: is_call(one, PASSTHROUGH))
    if not is_call(weights, SOFTMAX) or weights.args[1] not in (-1, len(shape_of(weights)) - 1):
        return False
    scores = _behind(weights.args[0], lambda one: _scales(one) or is_call(one, PASSTHROUGH), computed)
    operands = scores.args[1:] if scores.target is aten.baddbmm.default else scores.args
    return is_call(scores, SCORES) and all(operand in computed for operand in operands)


def _behind(node: Any, passes: Callable[[fx.Node], bool], computed: set[fx.Node] | None = None) -> fx.Node:
    """The first node upstream that is more than a rearrangement, or a scaling by stored tensors."""
    while passes(node):
        sources = [one for one in node.all_input_nodes if computed is None or one in computed]
        if len(sources) != 1:
            break
        node = sources[0]
    found: fx.Node = node
    return found


def _scales(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in SCALING


def _patches(nodes: list[fx.Node], computed: set[fx.Node], tokens: int) -> tuple[int, int]:
    """Which of `tokens` are patches (first, how many): those that a concatenation joins with stored tokens, else all."""
    for node in nodes:
        if not is_call(node, {aten.cat.default}) or len(shape_of(node)) != 3 or shape_of(node)[1] != tokens:
            continue
        first = 0
        for part in node.args[0]:  # type: ignore[union-attr]
            size = shape_of(part)[1]
            if part in computed and size < tokens:
                return first, size
            first += size
    return 0, tokens


def patch_similarity(patches: Tensor) -> Tensor:
    """Cosine similarities (rows, pairs) of patches (rows, patches, channels): each pair once, and none with itself."""
    unit = patches / (patches.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    pairs = torch.triu_indices(patches.shape[1], patches.shape[1], 1, device=patches.device)
    return (unit @ unit.transpose(1, 2))[:, pairs[0], pairs[1]]
