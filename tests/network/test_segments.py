"""Segments are found by how the data flows, whatever the classes are called."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, output_nodes
from dreamquant.network.interpreter import Values, interpret
from dreamquant.network.load import load
from dreamquant.network.onnx_import import load_onnx
from dreamquant.network.operators import data_nodes
from dreamquant.network.segments import segments

SHAPE = (3, 12, 10)


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 7, 3),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 6),
        nn.GELU(),
        nn.Linear(6, 4),
    )


class Fire(nn.Module):
    """SqueezeNet's module: a squeeze, then two branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        y: Tensor = self.last(F.max_pool2d(x, 2)).mean((2, 3))
        return y


class Inception(nn.Module):
    """Branches of several depths, one of them by pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.two, self.three, self.pooled = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        x = torch.cat([self.one(x), self.three(torch.relu(self.two(x))), pooled], 1)
        y: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return y


class Gated(nn.Module):
    """Squeeze and excitation, behind a split and around a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 6, 3), nn.Linear(3, 2), nn.Linear(2, 3)
        self.token, self.head = nn.Parameter(torch.ones(1, 1, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = a * torch.sigmoid(self.excite(torch.relu(self.squeeze(b.mean((2, 3))))))[:, :, None, None]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        y: Tensor = self.head(torch.relu(x)).mean(1)
        return y


CASES = {
    "chain": (chain, [1, 1, 1, 1]),
    "fire": (Fire, [1, 2, 1]),
    "inception": (Inception, [1, 4, 1]),
    "gated": (Gated, [1, 2, 1]),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, fill: Callable[..., nn.Module]) -> tuple[Network, list[int]]:
    build, layers = CASES[request.param]
    return capture(fill(build(), SHAPE), SHAPE), layers


def assert_they_are_the_network(network: Network, images: Tensor) -> None:
    """Every data node once, in order, each segment from one tensor to one tensor."""
    found = segments(network)
    nodes = data_nodes(network.graph.graph)
    assert [node for segment in found for node in segment.nodes] == nodes[1:]
    assert found[0].input is nodes[0]
    assert all(later.input is earlier.output for earlier, later in itertools.pairwise(found))
    assert output_nodes(network.graph.graph)[0] in found[-1].nodes
    for segment in found:
        inside = {segment.input, *segment.nodes}
        used = {source for node in segment.nodes for source in node.all_input_nodes if source in nodes}
        assert used <= inside
    value = images
    for segment in found:  # and they compute what it computes, each from nothing but the one before
        value = run_between(network, segment.input.name, segment.output.name, images, value)
    torch.testing.assert_close(value, network(images))


def run_between(network: Network, start: str, end: str, images: Tensor, value: Tensor) -> Tensor:
    """The tensor `end` where `start` is given; what else depends on the images is their number alone."""

    values: Values = {}
    with torch.no_grad():
        interpret(
            network.graph,
            torch.full_like(images, torch.nan),
            after=lambda node, computed: value if node.name == start else computed,
            values=values,
            keep=True,
        )
    return next(found for node, found in values.items() if node.name == end)


def test_layers_in_each(case: tuple[Network, list[int]]) -> None:
    network, layers = case

    assert [len(segment.layers) for segment in segments(network)] == layers


def test_segments_are_the_network(case: tuple[Network, list[int]], images: Callable[..., Tensor]) -> None:
    assert_they_are_the_network(case[0], images(3, SHAPE))


def test_a_residual_block_is_one_segment(residual: Network, residual_onnx: Path, images: Callable[..., Tensor]) -> None:
    for network in (residual, load_onnx(residual_onnx)):
        assert [len(segment.layers) for segment in segments(network)] == [1, 2, 2, 2, 1, 1]
        assert_they_are_the_network(network, images(2, residual.input_shape))


@pytest.mark.parametrize("name", ["digits.pt2", "digits_bnfolded.onnx"])
def test_blocks_of_a_trained_network(name: str, digits: Path, images: Callable[..., Tensor]) -> None:
    network = load(digits / name)

    assert [len(segment.layers) for segment in segments(network)] == [1, 2, 3, 3, 1]
    assert_they_are_the_network(network, images(2, network.input_shape))


def test_batchnorm_activation_and_pooling_stay_with_their_layer(fill: Callable[..., nn.Module]) -> None:
    network = capture(fill(chain(), SHAPE), SHAPE)
    kinds = [[node.target.__name__.split(".")[0] for node in segment.nodes] for segment in segments(network)]  # type: ignore[union-attr]

    assert kinds[0] == ["conv2d", "batch_norm", "relu", "max_pool2d"]
    assert kinds[1][:3] == ["conv2d", "leaky_relu", "adaptive_avg_pool2d"]
    assert kinds[3] == ["linear"]


def test_what_comes_before_the_first_layer_belongs_to_it() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv((x - 0.5) * 2)
            return y

    (segment,) = segments(capture(Prepared().eval(), SHAPE))
    assert len(segment.nodes) == 3


def test_a_network_without_layers_has_no_segments() -> None:
    assert segments(capture(nn.Sequential(nn.ReLU(), nn.Flatten()), SHAPE)) == []
