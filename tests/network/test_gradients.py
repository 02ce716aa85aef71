"""Gradients that are looked at stretch by stretch are those of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.network.capture import capture
from dreamquant.network.gradients import look_at_gradients, stretches
from dreamquant.network.graph import Network
from dreamquant.network.notes import is_tensor


class Branching(nn.Module):
    """A tensor that is read far behind, a split, and an output that leaves early."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.first(x).sigmoid()
        one, two = early.split(4, 1)
        late = self.third(self.second(one * two).relu()) + early
        return self.last(late.mean((2, 3))), early.amax((1, 2, 3))


@pytest.fixture(scope="module")
def branching() -> Network:
    torch.manual_seed(0)
    return capture(Branching().eval(), (3, 8, 8))


def seen(network: Network, images: Tensor, size: int) -> dict[str, Tensor]:
    """All gradients of two scalars, by node; watched are all tensors but the stored ones."""
    nodes = {node for node in network.graph.graph.nodes if node.op in ("placeholder", "call_function") and is_tensor(node)}
    found: dict[str, list[Tensor]] = {}

    def asked(result: Any, before: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        assert not before
        return [result[0].square().sum(), result[1].sum(), result[0].sum() + result[1].square().sum()]

    def look(node: fx.Node, value: Tensor, gradient: Tensor) -> None:
        assert value.shape == gradient.shape
        found.setdefault(node.name, []).append(gradient.clone())

    assert look_at_gradients(network.graph, images, nodes, asked, look, size=size) == 3
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def test_every_stretch_is_a_part_of_the_graph_and_none_parts_a_split(branching: Network) -> None:
    graph = branching.graph.graph
    parts = stretches(graph, 4, 1)

    assert [node for part in parts for node in part] == list(graph.nodes)
    assert len(parts) > 1
    assert len(stretches(graph, 4, 10**9)) == 1
    whole = next(part for part in parts if any("split" in node.name for node in part))
    assert sum("getitem" in node.name for node in whole) == 2


@pytest.mark.parametrize("size", [0, 10_000])
def test_stretches_give_the_gradients_of_one_run(branching: Network, size: int) -> None:
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, apart = (seen(branching, images, one) for one in (10**9, size))

    assert whole.keys() == apart.keys()
    assert len(whole) > 8
    for name, gradients in whole.items():
        torch.testing.assert_close(apart[name], gradients, rtol=1e-5, atol=1e-6)
    direct = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(branching.graph(direct)[0].square().sum(), direct)
    (name,) = (node.name for node in branching.graph.graph.nodes if node.op == "placeholder")
    torch.testing.assert_close(apart[name][0], expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_asks_for_nothing(branching: Network) -> None:
    def look(node: fx.Node, value: Tensor, gradient: Tensor) -> None:
        raise AssertionError

    assert look_at_gradients(branching.graph, torch.zeros(1, 3, 8, 8), (), lambda result, before: [], look, size=0) == 0  # noqa: ARG005
