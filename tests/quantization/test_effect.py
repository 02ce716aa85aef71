"""What an error does to the scores is told from gradients, and ranges give up what the scores do not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.network.answers import RIVALS
from dreamquant.network.capture import capture, noise
from dreamquant.network.graph import Network, input_node
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.quantization.effect import Effect, effects, narrowed
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.plan import Bits, load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student, prepare
from dreamquant.samples import Samples

SHAPE = (3, 6, 6)


class Loud(nn.Module):
    """A network whose middle tensor has one channel of values a hundred times the rest; the last layer reads it, or hardly."""

    def __init__(self, heard: float) -> None:
        super().__init__()
        self.heard = heard
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def shout(self) -> Loud:
        with torch.no_grad():
            self.first.weight[0] *= 100
            self.first.bias[0] *= 100  # type: ignore[index]
            self.middle.weight[:, 0] *= self.heard / 100
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.middle(torch.relu(self.first(x)))).mean((2, 3)))
        return y


@pytest.fixture
def loud(fill: Callable[..., Loud]) -> Callable[[float], Network]:
    return lambda heard: capture(fill(Loud(heard), SHAPE).shout(), SHAPE)


def samples(count: int = 16) -> Samples:
    return Samples(noise(count, SHAPE, seed=0), method="noise")


def student(network: Network, limit: float | None, **changes: Any) -> Student:
    return quantize(network, samples(), bits="W8A4", activation_ranges="mse", effect_limit=limit, **changes)


def ranges(of: Student) -> dict[str, float]:
    """The largest value of every activation's grid."""
    grids = {str(one.quantizer.target): one.grid for one in of.tensors() if one.kind == "activation"}
    return {name: ((grid.qmax - grid.zero_point) * grid.scale).item() for name, grid in grids.items() if isinstance(grid, Grid)}


def error(of: Student, network: Network) -> float:
    fresh = noise(64, SHAPE, seed=5)
    return (of(fresh) - network(fresh)).square().mean().item()


def test_a_linear_network_is_told_exactly(fill: Callable[..., nn.Module]) -> None:
    network = capture(fill(nn.Sequential(nn.Flatten(), nn.Linear(108, 6)), SHAPE), SHAPE)
    images = noise(12, SHAPE, seed=0)
    prepared, _, roots = prepare(network, load_plan("deploy"), Bits(weights=8, activations=4))
    effect = effects(prepared.network, {node for (node,) in roots.values()}, images)[input_node(prepared.network.graph.graph)]
    grid = grid_of_range(torch.tensor([-1.0]), torch.tensor([1.5]), bits=3, symmetric=False)
    found = effect.of([grid]).item()

    order = network(images).topk(RIVALS + 1).indices

    def distances(x: Tensor) -> Tensor:
        scores = network(x).gather(1, order)
        return scores[:, :1] - scores[:, 1:]

    moved = (distances(grid.fake(images)) - distances(images)).square().mean().item()
    assert found == pytest.approx(moved, rel=0.02)


def test_large_values_that_the_scores_hardly_hear_are_given_up(loud: Callable[[float], Network]) -> None:
    network = loud(0.01)
    plain, listening = student(network, None), student(network, 3)

    assert ranges(listening)["relu_grid"] < ranges(plain)["relu_grid"] / 5
    assert error(listening, network) < error(plain, network) / 5


def test_large_values_that_the_scores_hear_are_kept(loud: Callable[[float], Network]) -> None:
    network = loud(100.0)
    assert ranges(student(network, 3))["relu_grid"] > ranges(student(network, None))["relu_grid"] / 2


def test_the_limit_says_how_far_to_go_and_none_is_too_wide_to_be_kept(loud: Callable[[float], Network]) -> None:
    network = loud(0.01)
    found = [ranges(student(network, limit))["relu_grid"] for limit in (1, 3, 30, 1e9)]

    assert found == sorted(found)
    assert found[0] < found[2]
    assert ranges(student(network, 1e9)) == ranges(student(network, None))


def test_scores_keep_their_range(loud: Callable[[float], Network]) -> None:
    network = loud(0.01)
    name = list(ranges(student(network, None)))[-1]
    assert ranges(student(network, 1))[name] == ranges(student(network, None))[name]


def test_the_widest_of_the_good_ranges_is_taken() -> None:
    points = torch.linspace(-1, 9, 1000)
    silent = Effect(points, torch.zeros(4, 1000))
    ends = torch.tensor([-1.0]), torch.tensor([9.0])

    assert narrowed(*ends, silent, 1.0, bits=4, symmetric=False) == ends


def test_a_network_of_one_batch_size_is_run_at_that_size() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(20 * x.reshape(6, -1).softmax(0).reshape(2, *SHAPE)).amax((2, 3))
            return y

    network = capture(torch.export.export(Bound().eval(), (torch.zeros(2, *SHAPE),)))
    assert network.batch == 2
    assert student(network, 3)(samples(5).images).shape == (5, 4)


def test_a_network_without_layers_has_nothing_to_narrow() -> None:
    assert student(capture(nn.Sequential(nn.ReLU(), nn.Flatten()), SHAPE), 3).tensors() == []


def test_what_a_gradient_does_not_pass_is_followed_up_to_there() -> None:
    class Answer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Loud(1.0)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x).argmax(1, keepdim=True)
            return y

    network = capture(Answer(), SHAPE)
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    layers = [node for node in network.graph.graph.nodes if is_call(node, WEIGHTED)]
    assert set(effects(network, layers, images)) == set(layers)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match="effect_limit"):
        load_plan("deploy", effect_limit=0.5)
