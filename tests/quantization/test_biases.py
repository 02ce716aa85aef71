"""Biases are corrected by what their layers' errors have in common, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, aten, tensor_of
from dreamquant.network.interpreter import interpret
from dreamquant.network.operators import argument, unquantized
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples

SHAPE = (3, 6, 6)


def layer(network: Network) -> fx.Node:
    return next(node for node in network.graph.graph.nodes if node.target is aten.conv2d.default)


def bias(network: Network) -> Tensor:
    return tensor_of(network.graph, unquantized(argument(layer(network), 2)))


def output(network: Network, images: Tensor) -> Tensor:
    """What the convolution computes."""
    seen: dict[fx.Node, Any] = {}

    def after(node: fx.Node, value: Any) -> Any:
        seen[node] = value
        return value

    interpret(network.graph, images, after=after)
    found: Tensor = seen[layer(network)]
    return found


@pytest.mark.parametrize("count", [1, 9])
def test_a_bias_is_corrected_as_far_as_its_error_is_the_same_in_every_image(count: int, images: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    network, x = capture(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval(), SHAPE), images(count, SHAPE, seed=3)
    plain, corrected = (quantize(network, Samples(x), bits="W3A3", bias_correction=how).network for how in ("none", "samples"))
    errors = (output(plain, x) - output(network, x)).mean((2, 3))
    mean, variance = errors.mean(0), errors.var(0, correction=0)

    assert bool((variance > 0).all()) == (count > 1)
    torch.testing.assert_close(
        bias(plain) - bias(corrected), mean * mean.square() / (mean.square() + variance), rtol=1e-3, atol=1e-5
    )
