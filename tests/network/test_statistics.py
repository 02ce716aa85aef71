"""What BatchNorms remember, what enters them, and moments as torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.graph import Network
from dreamquant.network.onnx_import import load_onnx
from dreamquant.network.statistics import EPSILON, batch_norms, moments, probe


@pytest.fixture(scope="module", params=["torch", "onnx"])
def network(request: pytest.FixtureRequest, residual: Network, residual_onnx: Path) -> Network:
    return residual if request.param == "torch" else load_onnx(residual_onnx)


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """In the order in which a `Residual` runs them, which is the one it names them in."""
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def test_statistics_are_those_of_the_module(network: Network, residual_module: nn.Module) -> None:
    found = batch_norms(network)

    assert len(found) == len(norms(residual_module)) == 5
    for one, norm in zip(found, norms(residual_module), strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(one.mean, norm.running_mean)
        torch.testing.assert_close(one.std, (norm.running_var + EPSILON).sqrt())


def test_the_probe_gives_what_enters_each_batchnorm(
    network: Network, residual_module: nn.Module, images: Callable[..., Tensor]
) -> None:
    entering: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])) for norm in norms(residual_module)]
    x = images(3, network.input_shape)
    with torch.no_grad():
        expected = residual_module(x)
        output, features, _ = probe(network)(x)
    for hook in hooks:
        hook.remove()

    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert len(features) == 5
    for one, other in zip(features, entering, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_probe_lets_gradients_reach_the_images_and_leaves_the_network_alone(
    network: Network, images: Callable[..., Tensor]
) -> None:
    code = network.graph.code
    x = images(2, network.input_shape).requires_grad_()
    _, features, _ = probe(network)(x)
    features[-1].square().sum().backward()

    assert x.grad is not None
    assert bool(x.grad.any())
    assert network.graph.code == code
    assert all(tensor.grad is None for tensor in network.graph.buffers())


def test_without_batchnorms_there_are_no_statistics(digits: Path) -> None:
    network = load_onnx(digits / "digits_bnfolded.onnx")
    output, features, _ = probe(network)(torch.zeros(2, *network.input_shape))

    assert batch_norms(network) == []
    assert features == []
    assert output.shape == (2, 10)


@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (5, 3), (4, 2, 9)])
def test_moments_are_torchs(shape: tuple[int, ...], images: Callable[..., Tensor]) -> None:
    x = images(shape[0], shape[1:], seed=3) * 2 + 1
    mean, std = moments(x, per_sample=False)
    flat = x.transpose(0, 1).flatten(1)

    torch.testing.assert_close(mean, flat.mean(1))
    torch.testing.assert_close(std, (flat.var(1, correction=0) + EPSILON).sqrt())


def test_moments_of_each_sample_are_those_of_it_alone(images: Callable[..., Tensor]) -> None:
    x = images(4, (3, 5, 2))
    mean, std = moments(x, per_sample=True)

    assert mean.shape == std.shape == (4, 3)
    for index in range(4):
        alone = moments(x[index : index + 1], per_sample=False)
        torch.testing.assert_close((mean[index], std[index]), alone)


def test_moments_are_taken_in_float32(images: Callable[..., Tensor]) -> None:
    mean, std = moments(images(2, (3, 4, 4)).bfloat16(), per_sample=False)

    assert mean.dtype == std.dtype == torch.float32
