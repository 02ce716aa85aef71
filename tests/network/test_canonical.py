"""Decompositions compute what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dreamquant.network.canonical import canonicalize, flatten_attributes, infer_sizes, scaled_dot_product_attention
from dreamquant.network.graph import aten
from dreamquant.network.notes import notes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 7).tril(2).bool()},
        {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
        {"enable_gqa": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_attention_in_two_products_is_attention(options: dict[str, Any], images: Callable[..., Tensor]) -> None:
    length = 5 if "is_causal" in options else 7
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = images(2, (4, 5, 6)), images(2, (heads, length, 6), seed=1), images(2, (heads, length, 3), seed=2)

    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    )


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], **tensors: Tensor) -> fx.GraphModule:
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    return fx.GraphModule(root, graph)


def test_checks_on_the_way_are_dropped() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        graph.call_function(aten._assert_tensor_metadata.default, (x, None, None, torch.float32))
        return graph.call_function(aten.relu6.default, (x,))

    module = graph_of(build)
    canonicalize(module.graph)
    module.recompile()

    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [aten.hardtanh.default]
    x = torch.linspace(-3, 9, 50)
    assert torch.equal(module(x), F.relu6(x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_get_their_own_operation(dimensions: int, transposed: bool, images: Callable[..., Tensor]) -> None:
    ones = [1] * dimensions
    x, weight = images(2, (4, *[6] * dimensions)), images(4, (2, *[3] * dimensions))
    bias = torch.arange(4.0)
    settings = ([2] * dimensions, ones, ones, transposed, ones if transposed else [0] * dimensions, 2)

    def build(graph: fx.Graph, node: fx.Node) -> fx.Node:
        stored = (graph.get_attr("weight"), graph.get_attr("bias"))
        return graph.call_function(aten.convolution.default, (node, *stored, *settings))

    module = graph_of(build, weight=weight, bias=bias)
    expected = module(x)
    canonicalize(module.graph)
    module.recompile()
    (target,) = (node.target for node in module.graph.nodes if node.op == "call_function")

    assert target is not aten.convolution.default
    torch.testing.assert_close(module(x), expected)


def test_attributes_get_flat_names_and_keep_their_own() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    twice = [graph.get_attr("0.0.weight") for _ in range(2)]
    total = graph.call_function(aten.add.Tensor, (graph.call_function(aten.add.Tensor, (x, twice[0])), twice[1]))
    graph.output(total)
    flat = flatten_attributes(root, graph)
    (node,) = (node for node in flat.graph.nodes if node.op == "get_attr")

    assert node.target == "0_0_weight"
    assert notes(node).origin == "0.0.weight"
    assert not flat.get_buffer(str(node.target)).requires_grad
    torch.testing.assert_close(flat(torch.zeros(2, 2)), 2 * root[0][0].weight.detach())  # type: ignore[index]


def test_one_size_that_depends_on_the_batch_needs_no_arithmetic() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        size = graph.call_function(aten.sym_size.int, (x, 0))
        wide = graph.call_function(aten.reshape.default, (x, [size, 2, 3]))
        return graph.call_function(aten.reshape.default, (wide, [-1, 6]))

    module = graph_of(build)
    infer_sizes(module)

    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [aten.reshape.default] * 2
    assert module(torch.zeros(5, 6)).shape == (5, 6)
