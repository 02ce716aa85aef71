"""What BatchNorms remember, what enters them, and moments as torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.notes import shape_of
from dreamquant.network.onnx_import import load_onnx
from dreamquant.network.operators import CONVOLUTIONS, is_call
from dreamquant.network.statistics import EPSILON, _Moments, batch_norms, moments, probe, watch


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


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (6, 3), (3, 2, 9), (1, 2, 3, 3)])
def test_the_gradient_of_moments_is_autograds(shape: tuple[int, ...], per_sample: bool, images: Callable[..., Tensor]) -> None:
    x = (images(shape[0], shape[1:]) * 2 + 1).double().requires_grad_()
    if per_sample or len(shape) > 2:
        assert torch.autograd.gradcheck(lambda x: _Moments.apply(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), per_sample), x)

    single = x.detach().float().requires_grad_()
    flat = x.reshape(*shape[:2], -1)
    dims = (2,) if per_sample else (0, 2)
    variance, mean = torch.var_mean(flat, dims, correction=0)
    expected, found = (mean, (variance + EPSILON).sqrt()), moments(single, per_sample=per_sample)
    weights = [images(1, one.shape, seed=seed)[0] for seed, one in enumerate(expected)]
    for pair, at in ((expected, x), (found, single)):
        at.grad = None
        sum((weight * one).sum() for weight, one in zip(weights, pair, strict=True)).backward()  # type: ignore[union-attr]

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3 if variance.max() == 0 else 1e-5)
    assert single.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(single.grad.double(), x.grad, rtol=1e-4, atol=1e-2 if variance.max() == 0 else 1e-5)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 30, 1000, 30000])
def test_moments_are_as_exact_as_they_say_for_any_ratio_of_mean_to_deviation(
    ratio: float, per_sample: bool, images: Callable[..., Tensor]
) -> None:
    x = images(8, (3, 16, 12)) + ratio
    mean, std = moments(x, per_sample=per_sample)
    variance, exact = torch.var_mean(x.double(), (2, 3) if per_sample else (0, 2, 3), correction=0)

    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-6)
    assert ((std.double().square() - EPSILON - variance).abs() / (exact.square() + variance)).max() < 5e-7
    assert bool(std.isfinite().all())


def test_constant_features_have_moments_and_finite_gradients() -> None:
    x = torch.full((2, 3, 4, 4), 7.3, requires_grad=True)
    mean, std = moments(x, per_sample=True)
    (mean + std).sum().backward()

    assert std.max() < 0.02
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_watch_gives_the_values_of_nodes(network: Network, images: Callable[..., Tensor]) -> None:
    x = images(3, network.input_shape)
    relus = [node for node in network.graph.graph.nodes if "relu" in str(node.target)]
    assert len(relus) > 3
    with torch.no_grad():
        scores, values = watch(network, [*relus, relus[0]])(x)

    assert [value.shape[1:] for value in values[:-1]] == [shape_of(node)[1:] for node in relus]
    assert torch.equal(values[0], values[-1])
    assert all(value.min() == 0 for value, node in zip(values, relus, strict=False) if "leaky" not in str(node.target))
    torch.testing.assert_close(scores, network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_behind_a_batchnorm_is_probed_too(
    affine: bool, fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    shape = (2, 6, 5)
    norms = nn.BatchNorm2d(4, eps=0.3), nn.BatchNorm2d(4, affine=affine), nn.BatchNorm2d(4)
    module = fill(nn.Sequential(nn.Conv2d(2, 4, 3), *norms), shape)
    x = images(3, shape)
    with torch.no_grad():
        scores, features, embedding = probe(capture(module, shape))(x)
        stages = [module[: 1 + index](x) for index in range(4)]  # type: ignore[index]

    assert len(features) == 3
    for one, other in zip([*features, scores], stages, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedding, x.mean((2, 3)))  # what enters the one layer with weights


def test_before_stride_is_called_for_strided_convolutions_alone(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.wide, self.short = nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1), nn.Conv2d(3, 4, 1, stride=(1, 2))
            self.deep, self.last = nn.Conv2d(4, 5, 3, stride=2, groups=1), nn.Conv2d(5, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.norm(self.first(x)), 2)  # a pool has a stride too
            y: Tensor = self.last(self.deep(self.wide(x) + self.short(x)).relu())
            return y

    shape = (2, 14, 22)
    module = fill(Strided(), shape)
    network, x, entered = capture(module, shape), images(3, shape), []

    def doubled(value: Tensor) -> Tensor:
        entered.append(tuple(value.shape))
        return 2 * value

    with torch.no_grad():
        plain, swung = probe(network)(x), probe(network, before_stride=doubled)(x)
        torch.testing.assert_close(plain.scores, module(x))
        for layer in (module.wide, module.short, module.deep):
            layer.weight.mul_(2)  # type: ignore[operator,union-attr]
        expected = module(x)
        for layer in (module.wide, module.short, module.deep):
            layer.weight.div_(2)  # type: ignore[operator,union-attr]

    assert entered == [(3, 3, 7, 11), (3, 3, 7, 11), (3, 4, 7, 6)]
    torch.testing.assert_close(swung.scores, expected)
    torch.testing.assert_close(swung.features, plain.features)
    torch.testing.assert_close(network(x), plain.scores)  # the network itself is not changed


def test_the_digits_networks_strides_are_found(digits: Path) -> None:
    network, called = load(digits / "digits.pt2"), []
    strided = [
        node
        for node in network.graph.graph.nodes
        if is_call(node, CONVOLUTIONS) and len(node.args) > 3 and node.args[3] == [2, 2]
    ]
    probe(network, before_stride=lambda x: called.append(1) or x)(torch.zeros(2, *network.input_shape))  # type: ignore[func-returns-value]

    assert len(called) == len(strided) == 4


@pytest.mark.parametrize("ends", ["linear", "conv", "tokens", "nothing"])
def test_the_embedding_is_what_enters_the_last_layer_averaged_over_positions(
    ends: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x.flatten(2).transpose(1, 2)).mean(1)
            return y

    heads: dict[str, tuple[nn.Module, ...]] = {
        "linear": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        "conv": (nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "tokens": (Tokens(),),
    }
    shape = (2, 6, 5)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module = fill(nn.Sequential(body, *heads[ends]) if ends != "nothing" else nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), shape)
    x = images(3, shape)
    with torch.no_grad():
        expected = (x if ends == "nothing" else module[0](x)).mean((2, 3))  # type: ignore[index]
        torch.testing.assert_close(probe(capture(module, shape))(x).embedding, expected)
