"""Folding keeps the function, takes what can be taken, and leaves the network it was given alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor, nn

from dreamquant.flow import run
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


class Constants(nn.Module):
    """A function of images, of a layer and of constants."""

    def __init__(self, function: Callable[..., Tensor], layer: nn.Module, *sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.layer, self.count = function, layer, len(sizes)
        generator = torch.Generator().manual_seed(len(sizes))
        for number, size in enumerate(sizes):
            self.register_buffer(f"c{number}", torch.rand(size, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer, *(getattr(self, f"c{number}") for number in range(self.count)))


def rows(x: Tensor) -> Tensor:
    return x.flatten(2)


AFFINE: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many operations on constants stay
    "frozen BatchNorm": (lambda: Constants(lambda x, f, a, b: f(x) * a + b, nn.Conv2d(3, 5, 3), (1, 5, 1, 1), (1, 5, 1, 1)), 0),
    "no bias": (lambda: Constants(lambda x, f, a, b: b + a * f(x), nn.Conv2d(3, 5, 3, bias=False), (5, 1, 1), (1,)), 0),
    "numbers": (lambda: Constants(lambda x, f: (f(x) - 0.5) / 3.0 * 2.0 + 1.0, nn.Conv2d(3, 5, 3)), 0),
    "transposed": (lambda: Constants(lambda x, f, a, b: f(x) / a - b, nn.ConvTranspose2d(3, 5, 3, 2), (5, 1, 1), (5, 1, 1)), 0),
    "rows": (lambda: Constants(lambda x, f, a, b: f(rows(x)) * a + b, nn.Linear(48, 7, bias=False), (7,), (1, 1, 7)), 0),
    "negative": (lambda: Constants(lambda x, f, a: torch.relu(f(x) * -a), nn.Conv2d(3, 5, 3), (5, 1, 1)), 0),
    "a place each": (lambda: Constants(lambda x, f, a: f(x) + a, nn.Conv2d(3, 5, 3), (6, 4)), 1),
    "a row each": (lambda: Constants(lambda x, f, a: f(rows(x)) + a, nn.Linear(48, 7), (3, 1)), 1),
    "the other way": (lambda: Constants(lambda x, f, a: a - f(x), nn.Conv2d(3, 5, 3), (5, 1, 1)), 1),
    "many from one": (lambda: Constants(lambda x, f, a: f(x) * a, nn.Conv2d(3, 1, 3), (5, 1, 1)), 1),
    "no number": (lambda: Constants(lambda x, f, a: torch.relu(f(x) + a / 0.0).clamp(max=3.0), nn.Conv2d(3, 5, 3), (5, 1, 1)), 1),
    "read twice": (lambda: Constants(lambda x, f, a: (y := f(x)) * a + y, nn.Conv2d(3, 5, 3), (5, 1, 1)), 2),
    "two layers": (lambda: Constants(lambda x, f: f(x) + f(x * 2), nn.Conv2d(3, 5, 3)), 2),
}


def norms(network: Network) -> int:
    return sum(node.target is aten.batch_norm.default for node in network.graph.graph.nodes)


@pytest.mark.parametrize("name", list(AFFINE))
def test_constants_behind_a_layer_become_part_of_it(name: str, images: Callable[..., Tensor]) -> None:
    build, left = AFFINE[name]
    network = capture(build().eval(), SHAPE)
    folded = fold_batchnorm(network)
    x = images(4, SHAPE, seed=6)
    arithmetic = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar}

    assert sum(node.target in arithmetic for node in folded.graph.graph.nodes) == left
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_a_constant_does_to_a_channel_is_done_to_what_is_known_of_it(fill: Callable[..., nn.Module]) -> None:
    module = Constants(lambda x, f, a: f(x) * -a + 2.0, nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), (5, 1, 1))
    with warnings.catch_warnings():
        filled = fill(module, SHAPE)
    norm, factor = filled.layer[1], filled.c0.flatten()
    layer = next(node for node in fold_batchnorm(capture(filled, SHAPE)).graph.graph.nodes if node.target is aten.conv2d.default)
    normal = notes(layer).normal

    assert normal is not None
    torch.testing.assert_close(normal[0], 2 - norm.bias.detach() * factor)
    torch.testing.assert_close(normal[1], norm.weight.detach().abs() * factor)


def test_a_norm_across_the_rows_of_a_linear_layer_stays(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings():
        module = fill(Function(lambda x, f, n: n(f(x.flatten(2))), nn.Linear(48, 3), nn.BatchNorm1d(3)), SHAPE)
    network = capture(module, SHAPE)
    folded, x = fold_batchnorm(network), images(4, SHAPE, seed=6)

    assert norms(folded) == 1
    torch.testing.assert_close(folded(x), network(x))


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


def test_constants_of_a_file_leave_the_quantized_file(tmp_path: Path) -> None:
    graph = """
        <ir_version: 8, opset_import: ["" : 13]>
        g (float[n, 3, 6, 6] x, float[4, 3, 3, 3] w, float[1, 4, 1, 1] m, float[4, 1, 1] a, int64[3] shape, float[16, 5] v, float[5] b)
        => (float[n, 4, 5] y)
        {
            c = Conv(x, w)
            d = Mul(c, m)
            e = Sub(d, a)
            f = Relu(e)
            r = Reshape(f, shape)
            p = MatMul(r, v)
            y = Add(b, p)
        }"""
    model = onnx.parser.parse_model(graph)
    generator = np.random.default_rng(0)
    for entry in list(model.graph.input)[1:]:
        sizes = [size.dim_value for size in entry.type.tensor_type.shape.dim]
        value = np.array([0, 4, 16]) if entry.name == "shape" else generator.uniform(0.1, 1, sizes).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, entry.name))
        model.graph.input.remove(entry)
    onnx.save(model, tmp_path / "frozen.onnx")
    loading = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "outputs": {"y": "values"}}
    run(tmp_path / "frozen.onnx", tmp_path / "q.onnx", settings=["synthesis.count=4"], estimate=False, **loading)
    written = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]

    assert not {"Mul", "Sub"} & set(written)
    assert written.count("Add") == 1  # a MatMul has no place for a bias
    assert written.count("Conv") == written.count("MatMul") == 1
