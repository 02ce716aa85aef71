"""Folding keeps the function, takes what can be taken, and leaves the network it was given alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, aten
from dreamquant.network.notes import notes
from dreamquant.network.onnx_import import load_onnx
from dreamquant.transform.fold_batchnorm import fold_batchnorm

SHAPE = (3, 8, 6)


class Function(nn.Module):
    """A function of images and of some layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def flat(x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    y: Tensor = norm(linear(x.flatten(1)))
    return y


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many BatchNorms stay
    "bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()), 0),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)), 0),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), 0),
    "another eps": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=0.5)), 0),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.BatchNorm2d(3)), 0),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 6, (1, 3), groups=3), nn.BatchNorm2d(6)), 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3, 2), nn.BatchNorm2d(5)), 0),
    "transposed, no bias": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 2, bias=False), nn.BatchNorm2d(5)), 0),
    "transposed and grouped": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6)), 1),
    "one dimension": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), 0),
    "transposed, one dimension": (lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(3, 5, 3), nn.BatchNorm1d(5)), 0),
    "linear": (lambda: Function(flat, nn.Linear(144, 7), nn.BatchNorm1d(7)), 0),
    "linear, no bias": (lambda: Function(flat, nn.Linear(144, 7, bias=False), nn.BatchNorm1d(7)), 0),
    "two in a row": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)), 0),
    "first of all": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)), 1),
    "behind an activation": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5)), 1),
    "read twice": (lambda: Function(lambda x, f, n: f(x) + n(f(x)), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), 1),
    "output read twice": (lambda: Function(lambda x, f, n: (y := f(x)) + n(y), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), 1),
    "layer used twice": (
        lambda: Function(lambda x, f, n, m: n(f(x)) + m(f(x * 2)), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)),
        2,
    ),
    "norm used twice": (
        lambda: Function(lambda x, f, g, n: n(f(x)) + n(g(x)), nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)),
        0,
    ),
}


def norms(network: Network) -> int:
    return sum(node.target is aten.batch_norm.default for node in network.graph.graph.nodes)


@pytest.mark.parametrize("name", list(CASES))
def test_the_function_is_kept(name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    build, left = CASES[name]
    with warnings.catch_warnings():
        module = fill(build(), SHAPE)
    network = capture(module, SHAPE)
    before = copy.deepcopy(dict(network.graph.named_buffers()))
    code = network.graph.code
    folded = fold_batchnorm(network)
    x = images(4, SHAPE, seed=6)

    assert norms(folded) == left
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    assert network.graph.code == code
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.graph.named_buffers())


def test_folding_twice_is_folding_once(residual: Network) -> None:
    once = fold_batchnorm(residual)

    assert norms(once) == 0
    assert fold_batchnorm(once).graph.code == once.graph.code


def test_every_norm_of_a_file_is_folded_and_its_name_taken_over(residual_onnx: Path, images: Callable[..., Tensor]) -> None:
    network = load_onnx(residual_onnx)
    folded = fold_batchnorm(network)
    x = images(4, network.input_shape)
    origins = {notes(node).origin for node in network.graph.graph.nodes if node.target is aten.batch_norm.default}
    layers = [node for node in folded.graph.graph.nodes if notes(node).absorbed]

    assert {notes(node).origin for node in layers} == origins
    assert len(layers) == 5
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
