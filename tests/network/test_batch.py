"""Graphs traced at one batch size are freed of it, or left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.network.batch import difference, free_batch, noise
from dreamquant.network.capture import flatten
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import is_tensor

aten = torch.ops.aten
SHAPE = (4, 8, 8)


class Function(nn.Module):
    """A network of one function on images and a small constant."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", torch.arange(1.0, 9.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


def traced(module: nn.Module, batch: int) -> fx.GraphModule:
    """The graph of `module` at exactly `batch` images."""
    images = noise(batch, SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = flatten(torch.export.export(module.eval(), (images,)))
    record_shapes(graph, images)
    return graph


def run(graph: fx.GraphModule, images: Tensor) -> Tensor:
    (output,) = graph(images)
    return output  # type: ignore[no-any-return]


def heads(x: Tensor, _: Tensor) -> Tensor:
    count = x.shape[0]
    tokens = x.flatten(2).transpose(1, 2).reshape(count, 64, 2, 2).permute(0, 2, 1, 3)
    return torch.softmax(tokens @ tokens.transpose(-1, -2), -1).matmul(tokens).transpose(1, 2).reshape(count, 64, 4)


def windows(x: Tensor, _: Tensor) -> Tensor:
    count = x.shape[0]
    cut = x.view(count, 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(count * 4, 4, 16)
    mixed = cut @ cut.transpose(1, 2) @ cut
    return mixed.view(count, 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(count, 4, 8, 8)


def token(x: Tensor, c: Tensor) -> Tensor:
    return torch.cat([c.view(1, 1, 8).expand(x.shape[0], 1, 8), x.flatten(2)[:, :, :8]], 1)


def repeated(x: Tensor, c: Tensor) -> Tensor:
    return torch.cat([c.view(1, 1, 8).repeat(x.shape[0], 1, 1), x.flatten(2)[:, :, :8]], 1)


def zero_channels(x: Tensor, _: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros(x.shape[0], 2, 8, 8)], 1)


def rows_first(x: Tensor, _: Tensor) -> Tensor:
    count = x.shape[0]
    rows = x.flatten(2).permute(2, 0, 1)
    split = rows.reshape(64, count * 2, 2).transpose(0, 1)
    mixed = torch.softmax(split @ split.transpose(1, 2), -1) @ split
    return mixed.transpose(0, 1).reshape(64 * count, 4).view(64, count, 4).mean(0)


def shuffled(x: Tensor, _: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], -1, 8, 8)


def merged(x: Tensor, _: Tensor) -> Tensor:
    return x.flatten(0, 1).unsqueeze(1).mul(2).unflatten(0, (x.shape[0], 4)).squeeze(2)


def wide(x: Tensor, _: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True).expand(x.shape[0], 4, 3, 3)


FREE = [heads, windows, token, repeated, zero_channels, rows_first, shuffled, merged, wide]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("function", FREE)
def test_batch_is_freed(function: Callable[[Tensor, Tensor], Tensor], batch: int) -> None:
    module = Function(function)
    graph = traced(module, batch)
    images = noise(7, SHAPE)

    assert free_batch(graph, SHAPE, batch) is None
    torch.testing.assert_close(run(graph, images), module(images))


def test_sizes_become_products_of_the_batch() -> None:
    graph = traced(Function(windows), 2)
    free_batch(graph, SHAPE, 2)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]

    assert targets.count(aten.sym_size.int) <= 1
    assert all(is_tensor(node) for node in graph.graph.nodes if node.target is aten.reshape.default)


def test_graph_that_runs_any_batch_stays_as_it_is() -> None:
    graph = traced(nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), 2)
    nodes = list(graph.graph.nodes)

    assert free_batch(graph, SHAPE, 2) is None
    assert list(graph.graph.nodes) == nodes


def test_size_that_only_looks_like_the_batch_stays() -> None:
    module = Function(lambda x, c: x[:, :2] * c.view(1, 1, 8).expand(2, 8, 8))
    graph = traced(module, 2)

    assert free_batch(graph, SHAPE, 2) is None
    torch.testing.assert_close(run(graph, noise(5, SHAPE)), module(noise(5, SHAPE)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, _: x - x.mean(0),
        lambda x, _: x.reshape(8, -1).softmax(0),
    ],
    ids=["mixed", "batch-lost"],
)
def test_graph_that_is_bound_to_its_batch_stays_as_it_is(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = traced(Function(function), 2)
    before = graph.code

    assert free_batch(graph, SHAPE, 2) == 2
    assert graph.code == before


def test_images_may_lie_in_the_second_axis_of_what_is_returned() -> None:
    module = Function(lambda x, _: x.transpose(0, 1).sum((2, 3)))
    graph = traced(module, 2)

    assert free_batch(graph, SHAPE, 2) is None
    torch.testing.assert_close(run(graph, noise(5, SHAPE)), module(noise(5, SHAPE)))


def test_squeeze_that_would_swallow_a_single_image_stays_bound() -> None:
    graph = traced(Function(lambda x, _: x.mean((2, 3)).squeeze()), 2)

    assert free_batch(graph, SHAPE, 2) == 2


def test_noise_is_the_same_at_every_call_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()

    assert torch.equal(noise(2, SHAPE), noise(2, SHAPE))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("expected", "actual", "wanted"),
    [
        ([1.0, 3.0], [1.0, 3.4], 0.1),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [math.inf, 1.2], 0.1),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([1.0, 1.0], [math.nan, 1.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_difference(expected: list[float], actual: list[float], wanted: float) -> None:
    assert difference(torch.tensor(expected), torch.tensor(actual)) == pytest.approx(wanted)
