"""Every synthesis method keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.methods import Method, find_method, method_names
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.outputs import restated
from dreamquant.synthesis import needs_batchnorm, synthesize

METHODS = [find_method("synthesis", name) for name in method_names("synthesis")]
FREE = [method for method in METHODS if not needs_batchnorm(method)]
BOUND = [method for method in METHODS if needs_batchnorm(method)]
ATTENTIVE = [method for method in METHODS if getattr(method.module, "NEEDS_ATTENTION", False)]


def few(method: Method) -> dict[str, Any]:
    """Options under which a method is quick."""
    return {"steps": 3} if "steps" in method.options else {}


def dream(network: Network, method: Method, count: int = 3, **settings: Any) -> Tensor:
    return synthesize(network, count, method=method.name, **{"seed": 1, **few(method), **settings}).images


@pytest.fixture(scope="module")
def plain(fill: Callable[..., nn.Module]) -> Network:
    """A network without BatchNorm, one channel in."""
    shape = (1, 9, 6)
    module = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))
    return capture(fill(module, shape), shape)


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def network(method: Method, residual: Network, transformer: Network) -> Network:
    """One that the method can work on."""
    return transformer if method in ATTENTIVE else residual


@pytest.mark.parametrize("count", [1, 5])
def test_images_fit_the_network(network: Network, method: Method, count: int) -> None:
    samples = synthesize(network, count, method=method.name, **few(method))

    assert samples.images.shape == (count, *network.input_shape)
    assert samples.images.dtype == torch.float32
    assert not samples.images.requires_grad
    assert bool(samples.images.isfinite().all())
    assert samples.images.std() > 0
    assert len(samples) == count
    assert (samples.method, samples.seed) == (method.name, 0)
    assert samples.labels is None or samples.labels.shape == (count,)
    assert network(samples.images).shape[0] == count


@pytest.mark.parametrize("method", FREE, ids=lambda method: method.name)
def test_what_needs_no_batchnorm_works_without(plain: Network, transformer: Network, method: Method) -> None:
    network = transformer if method in ATTENTIVE else plain
    assert dream(network, method, 2).shape == (2, *network.input_shape)


@pytest.mark.parametrize("method", ATTENTIVE, ids=lambda method: method.name)
def test_what_needs_attention_says_so_and_names_methods_that_work(residual: Network, plain: Network, method: Method) -> None:
    for network, works in ((residual, [one.name for one in METHODS if one not in ATTENTIVE]), (plain, ["fractal", "noise"])):
        with pytest.raises(
            OptionError, match=f"{method.name!r} needs attention, and there is no softmax between two products"
        ) as caught:
            dream(network, method)
        named = str(caught.value).partition("; methods that work on it: ")[2].split(", ")
        assert set(works) <= set(named)
        assert not {one.name for one in ATTENTIVE} & set(named)


@pytest.mark.parametrize("method", BOUND, ids=lambda method: method.name)
def test_what_needs_batchnorm_says_so_and_names_those_that_do_not(plain: Network, method: Method) -> None:
    with pytest.raises(OptionError, match=f"{method.name!r} needs BatchNorm statistics, and there are none") as caught:
        dream(plain, method)
    works = [one.name for one in FREE if one not in ATTENTIVE]
    assert str(caught.value).endswith(f"methods that work on it: {', '.join(works)}")


def test_a_seed_gives_the_same_bits_and_another_seed_other_ones(network: Network, method: Method) -> None:
    assert torch.equal(dream(network, method), dream(network, method))
    assert not torch.equal(dream(network, method), dream(network, method, seed=2))


def test_images_of_one_run_differ(network: Network, method: Method) -> None:
    one, other = dream(network, method, 2)

    assert not torch.equal(one, other)


def test_the_network_and_the_global_generator_are_left_as_they_were(network: Network, method: Method) -> None:
    buffers = {name: tensor.clone() for name, tensor in network.graph.named_buffers()}
    code, state, threads = network.graph.code, torch.random.get_rng_state(), torch.get_num_threads()
    dream(network, method)

    assert all(torch.equal(tensor, buffers[name]) for name, tensor in network.graph.named_buffers())
    assert all(not tensor.requires_grad for tensor in network.graph.buffers())
    assert network.graph.code == code
    assert not network.graph.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_progress_is_told(network: Network, method: Method) -> None:
    told: list[tuple[int, int, float]] = []
    dream(network, method, 4, callback=lambda done, total, loss: told.append((done, total, loss)))

    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert all(done <= total for done, total, _ in told)
    assert all(isinstance(loss, float) for _, _, loss in told)
    if "steps" in method.options:
        assert len(told) == 3


def test_options_come_as_text_too(network: Network, method: Method) -> None:
    options = {name: str(parameter.default) for name, parameter in method.options.items()} | few(method)

    assert torch.equal(dream(network, method, **options), dream(network, method))


def test_a_method_says_what_it_does_and_where_it_comes_from(method: Method) -> None:
    assert method.paper
    assert method.summary.endswith(".")
    assert isinstance(method.module.NEEDS_BATCHNORM, bool)
    assert all(parameter.default is not parameter.empty for parameter in method.options.values())


@pytest.mark.parametrize("count", [0, -3])
def test_no_images_are_refused(network: Network, method: Method, count: int) -> None:
    with pytest.raises(OptionError, match=f"count is {count}; at least one image is needed"):
        dream(network, method, count)


def test_an_unknown_option_is_refused(network: Network, method: Method) -> None:
    with pytest.raises(OptionError, match=f"unknown option of synthesis method {method.name!r}: 'stepps'"):
        dream(network, method, stepps=3)


def test_an_unknown_method_is_answered_with_the_nearest(residual: Network) -> None:
    with pytest.raises(OptionError, match="unknown synthesis method 'zeroqq'; did you mean 'zeroq'"):
        synthesize(residual, 1, method="zeroqq")


@pytest.fixture(scope="module")
def pairs(fill: Callable[..., nn.Module]) -> Network:
    """A network that takes two images at once, no more and no fewer."""

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:  # such sizes hold for two images alone
                x = 20 * x.reshape(6, -1).softmax(0).reshape(2, 3, 5, 4)
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            y: Tensor = F.scaled_dot_product_attention(x, x, x).mean(1)
            return y

    module = fill(Bound(), (3, 5, 4))
    network = capture(torch.export.export(module, (torch.zeros(2, 3, 5, 4),)))
    return replace(network, outputs=restated(network, {"output": "classes"}))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_network_of_one_batch_size_is_dreamt_with(pairs: Network, method: Method, count: int) -> None:
    assert pairs.batch == 2
    assert dream(pairs, method, count).shape == (count, 3, 5, 4)


def test_confidence_is_the_probability_that_the_network_gives(fill: Callable[..., nn.Module]) -> None:
    layers = [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5)]
    module = fill(nn.Sequential(*layers), (1, 9, 6))
    plain, normalised = (capture(one, (1, 9, 6)) for one in (module, nn.Sequential(module, nn.Softmax(1)).eval()))
    one, other = (synthesize(network, 3, method="fractal") for network in (plain, normalised))

    assert one.confidence is not None
    assert other.confidence is not None
    torch.testing.assert_close(one.confidence, plain(one.images).softmax(1).amax(1))
    torch.testing.assert_close(other.confidence, one.confidence)
