"""Biases are corrected by what their layers' errors have in common, image by image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.capture import capture
from dreamquant.network.edit import bias_of
from dreamquant.network.graph import aten
from dreamquant.quantization import quantize
from dreamquant.samples import Samples

SHAPE = (3, 6, 6)


@pytest.mark.parametrize("count", [1, 9])
def test_a_bias_is_corrected_as_far_as_its_error_is_the_same_in_every_image(count: int, images: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    network = capture(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval(), SHAPE)
    x = images(count, SHAPE, seed=3)
    plain, corrected = (quantize(network, Samples(x), bits="W3A3", bias_correction=how) for how in ("none", "samples"))

    def layer(student: Student) -> fx.Node:
        return next(node for node in student.network.graph.graph.nodes if node.target is aten.conv2d.default)

    def bias(student: Student) -> Tensor:
        return tensor_of(student.network.graph, unquantized(argument(layer(student), 2)))

    seen: list[Tensor] = []
    interpret(plain.network.graph, x, after=lambda node, value: seen.append(value) if node is layer(plain) else None or value)
    exact = network.graph
    weight, bias = (dict(exact.named_buffers())[name] for name in ("_0_weight", "_0_bias"))
    errors = (output(plain) - nn.functional.conv2d(x, weight, bias)).mean((2, 3))
    mean, variance = errors.mean(0), errors.var(0, correction=0)
    expected = mean * mean.square() / (mean.square() + variance)

    torch.testing.assert_close(before(plain) - before(corrected), expected, rtol=1e-3, atol=1e-5)
    assert bool((variance > 0).all()) == (count > 1)
