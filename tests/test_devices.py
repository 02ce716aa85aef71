"""Where networks compute: every method keeps to the device of its network, which here is one that there is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pretend import PRETEND, PretendDevice, Pretended
from torch import Tensor, nn

from dreamquant.allocation import allocate
from dreamquant.devices import CPU, find_device
from dreamquant.errors import OptionError
from dreamquant.methods import method_names
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.scores import float_answers
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.reconstruction import reconstruct
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.training import train


@pytest.fixture(autouse=True)
def pretending() -> Iterator[None]:
    with PretendDevice():
        yield


@pytest.fixture(scope="module")
def small(fill: Callable[..., nn.Module]) -> Network:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 5, 3, 2), nn.BatchNorm2d(5), nn.LeakyReLU()
    )
    module = nn.Sequential(*module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))
    return capture(fill(module, (3, 8, 7)), (3, 8, 7))


@pytest.fixture(scope="module")
def there(small: Network) -> Network:
    with PretendDevice():
        return small.to(PRETEND)


@pytest.fixture(scope="module")
def few(images: Callable[..., Tensor], small: Network) -> Samples:
    return Samples(images(6, small.input_shape), torch.arange(6) % 5)


@pytest.fixture(scope="module")
def student(there: Network, few: Samples) -> Student:
    with PretendDevice():
        return quantize(there, few, bits="W3A4", plan="brecq")


class TestPretendDevice:
    def test_tensors_of_two_devices_are_not_mixed(self) -> None:
        one, other = torch.ones(3, device=PRETEND), torch.ones(3)

        assert one.device == PRETEND
        assert (one + one).device == (one * 2)[0].device == torch.zeros_like(one).device == PRETEND
        assert torch.equal((one + other.to(PRETEND)).cpu(), other + other)
        for mix in (lambda: one + other, lambda: torch.cat([one, other]), lambda: other[one.long()], lambda: one.add_(other)):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises((TypeError, RuntimeError)):
            one.numpy()

    def test_gradients_and_views_stay_there(self) -> None:
        x = torch.arange(6.0, device=PRETEND).requires_grad_()
        (x.view(2, 3)[1] ** 2).sum().backward()

        assert isinstance(x.grad, Pretended)
        assert x.grad.tolist() == [0, 0, 0, 6, 8, 10]


def state(student: Student) -> list[Tensor]:
    """All numbers of a student, brought home."""
    grids = [part for tensor in student.tensors() for part in vars(tensor.grid).values() if isinstance(part, Tensor)]
    return [value.cpu() for value in (*student.network.graph.buffers(), *grids)]


def lies_there(student: Student) -> bool:
    stored = [*student.network.graph.buffers(), *student.network.graph.parameters()]
    grids = [part for tensor in student.tensors() for part in vars(tensor.grid).values() if isinstance(part, Tensor)]
    return all(isinstance(value, Pretended) for value in (*stored, *grids))


@pytest.mark.parametrize("method", method_names("synthesis"))
def test_images_are_those_of_the_processor(
    small: Network, there: Network, transformer: Network, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamquant.synthesis._loop._has_bfloat16", lambda _: False)
    home, other = (transformer, transformer.to(PRETEND)) if method == "psaq" else (small, there)
    options: dict[str, Any] = {} if method in ("noise", "fractal") else {"steps": 2}
    made = [synthesize(network, 3, method=method, seed=3, **options) for network in (home, other)]

    assert torch.equal(made[0].images, made[1].images)
    assert not isinstance(made[1].images, Pretended)
    assert not isinstance(made[1].labels, Pretended)


@pytest.mark.parametrize("start", ["published", "procedural"])
@pytest.mark.parametrize("method", ["rsd", "dsg", "zeroq"])
def test_images_may_begin_from_procedural_ones(there: Network, method: str, start: str) -> None:
    assert len(synthesize(there, 3, method=method, steps=1, start=start)) == 3


PLANS: dict[str, dict[str, Any]] = {
    **{f"ranges {name}": {"activation_ranges": name, "weight_ranges": name} for name in method_names("ranges") if name != "mse"},
    "ranges mse": {"activation_ranges": "mse", "activation_options": {"steps": 3}},
    **{f"codebooks {name}": {"weight_levels": name} for name in method_names("codebooks")},
    "observing the quantized prefix": {"observe": "quantized"},
    "batchnorm": {"range_source": "batchnorm", "bias_correction": "batchnorm"},
    "outputs": {"activation_ranges": "outputs", "bias_correction": "outputs", "spare": "outputs"},
    "effects": {"effect_limit": 1.0},
    "bits by channel": {"channel_bits": True, "weight_symmetric": False},
    "equalized": {"transforms": ["fold_batchnorm", "equalize", "absorb_bias"], "range_source": "batchnorm"},
    "split": {"transforms": ["fold_batchnorm", "split_channels"], "weight_granularity": "tensor"},
}


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_students_are_those_of_the_processor(small: Network, there: Network, few: Samples, changes: dict[str, Any]) -> None:
    home, other = (quantize(network, few, bits="W4A4", plan="deploy", **changes) for network in (small, there))

    assert lies_there(other)
    assert all(map(torch.equal, state(home), state(other)))
    assert torch.equal(home(few.images), other.to(CPU)(few.images))


def test_what_a_network_makes_as_it_runs_is_made_there(
    transformer: Network, residual: Network, images: Callable[..., Tensor]
) -> None:
    for network in (transformer, residual):
        student = quantize(network.to(PRETEND), Samples(images(4, network.input_shape)))

        assert lies_there(student)


@pytest.mark.parametrize("method", method_names("allocation"))
def test_allocations_are_those_of_the_processor(small: Network, there: Network, few: Samples, method: str) -> None:
    options = {"mixed": {"choices": "4,8"}, "auto": {"agreement": 0.0, "kl": 0.018}}.get(method, {})
    home, other = (allocate(network, few, "zeroq", bits="W4A8", method=method, **options) for network in (small, there))

    assert home == other


@pytest.mark.parametrize("method", method_names("reconstruction"))
def test_reconstruction_stays_there_and_goes_on(student: Student, few: Samples, method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if method == "nearest" else {"steps": 2, "batch": 4, "memory": 1e-6}
    found = [reconstruct(student, few, method=method, folder=tmp_path, **options) for _ in range(2)]

    assert all(map(lies_there, found))
    assert all(map(torch.equal, *map(state, found)))


@pytest.mark.parametrize("method", method_names("training"))
def test_training_stays_there_and_goes_on(there: Network, student: Student, few: Samples, method: str, tmp_path: Path) -> None:
    options = {"epochs": 2, "iterations": 2, "warm_up": 1, "range_epochs": 1, "batch": 4, "width": 4, "latent": 5, "patience": 2}
    found = [train(there, student, few, method=method, folder=tmp_path, **options) for _ in range(2)]

    assert all(map(lies_there, found))
    assert all(map(torch.equal, *map(state, found)))


def test_answers_come_home(small: Network, there: Network, few: Samples) -> None:
    (answers,) = float_answers(there, few.images)

    assert torch.equal(answers, float_answers(small, few.images)[0])
    assert isinstance(there(few.images), Pretended)
    assert there.to(CPU).device == CPU


class TestFindDevice:
    @pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:99", "mps", "", "cpu:1"])
    def test_what_is_not_known_or_not_there_is_an_error_of_one_line(self, name: str) -> None:
        with pytest.raises(OptionError, match="present: cpu") as error:
            find_device(name)
        assert "\n" not in str(error.value)

    def test_the_processor_where_there_is_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert find_device("auto") == find_device("cpu") == find_device(CPU) == CPU
        with pytest.raises(OptionError, match="no device cuda here"):
            find_device("cuda")

    def test_the_first_gpu_where_there_are_some(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert find_device("auto") == find_device("cuda") == torch.device("cuda:0")
        assert find_device("CUDA:1") == torch.device("cuda:1")
        assert find_device("cpu") == CPU
