"""What every training method keeps: its own student, the same bits, a run that goes on, a file that does the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import DataError, OptionError
from dreamquant.exporters.export import export
from dreamquant.methods import find_method, method_names
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.load import load
from dreamquant.network.notes import notes
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training import train

METHODS = method_names("training")
GENERATING = [name for name in METHODS if name != "lrq"]
EPOCHS, ITERATIONS = 4, 3
FEW: dict[str, Any] = {
    "epochs": EPOCHS,
    "iterations": ITERATIONS,
    "warm_up": 2,
    "range_epochs": 1,
    "batch": 6,
    "learning_rate": 1e-3,
    "milestones": "3",
    "clip": 5.0,
    "width": 4,
    "latent": 5,
}


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W3A4", plan="zeroq")


def teach(network: Network, student: Student, samples: Samples, method: str, **settings: Any) -> Student:
    return train(network, student, samples, method=method, **{**FEW, **settings})


@pytest.fixture(scope="module")
def results(residual: Network, student: Student, calibration: Samples) -> dict[str, Student]:
    return {method: teach(residual, student, calibration, method) for method in METHODS}


def state(student: Student) -> dict[str, Tensor]:
    found = dict(student.network.graph.state_dict())
    for tensor in student.tensors():
        assert isinstance(tensor.grid, Grid)
        found |= {f"{tensor.quantizer.name} scale": tensor.grid.scale, f"{tensor.quantizer.name} zero": tensor.grid.zero_point}
    return found


def same(one: Student, other: Student) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_student_is_left_and_the_same_seed_gives_the_same_bits(
    residual: Network, student: Student, calibration: Samples, results: dict[str, Student], method: str
) -> None:
    before = copy.deepcopy(state(student))
    teacher, random = copy.deepcopy(residual.graph.state_dict()), torch.random.get_rng_state()
    again = teach(residual, student, calibration, method)
    other = teach(residual, student, calibration, method, seed=1)

    assert same(again, results[method])
    assert not same(other, results[method])
    assert not same(student, results[method])
    assert all(torch.equal(value, before[name]) for name, value in state(student).items())
    assert all(torch.equal(value, teacher[name]) for name, value in residual.graph.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(tensor.requires_grad for tensor in state(results[method]).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    residual: Network,
    student: Student,
    calibration: Samples,
    results: dict[str, Student],
    method: str,
    epoch: int,
    tmp_path: Path,
) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        if done == epoch * ITERATIONS + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(residual, student, calibration, method, folder=tmp_path, callback=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]
    steps: list[int] = []
    found = teach(residual, student, calibration, method, folder=tmp_path, callback=lambda *words: steps.append(words[0]))

    assert same(found, results[method])
    assert steps == list(range(epoch * ITERATIONS + 1, EPOCHS * ITERATIONS + 1))
    steps.clear()
    finished = teach(residual, student, calibration, method, folder=tmp_path, callback=lambda *words: steps.append(words[0]))
    assert same(finished, results[method])
    assert not steps


@pytest.mark.parametrize("changed", [{"seed": 5}, {"temperature": 3.0}, {"latent": 6}, {"milestones": "2"}])
def test_what_another_run_left_is_not_taken(
    residual: Network,
    student: Student,
    calibration: Samples,
    results: dict[str, Student],
    changed: dict[str, Any],
    tmp_path: Path,
) -> None:
    teach(residual, student, calibration, "gdfq", folder=tmp_path, **changed)
    steps: list[int] = []
    found = teach(residual, student, calibration, "gdfq", folder=tmp_path, callback=lambda *words: steps.append(words[0]))
    assert same(found, results["gdfq"])
    assert len(steps) == EPOCHS * ITERATIONS


@pytest.mark.parametrize("method", METHODS)
def test_weights_stand_on_their_grids(results: dict[str, Student], method: str) -> None:
    weights = [tensor for tensor in results[method].tensors() if tensor.kind == "weight"]
    assert len(weights) > 5
    for tensor in weights:
        weight = tensor_of(results[method].network.graph, tensor.node)
        torch.testing.assert_close(tensor.grid.fake(weight), weight, rtol=1e-6, atol=1e-7)
        assert tensor.grid.bits == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_file_does_what_the_student_does(
    results: dict[str, Student], calibration: Samples, method: str, tmp_path: Path
) -> None:
    artifact = export(results[method], tmp_path / "out.onnx", calibration)
    assert artifact.verification.top1_agreement > 95


@pytest.mark.parametrize("method", METHODS)
def test_progress_ends_at_the_total(residual: Network, student: Student, calibration: Samples, method: str) -> None:
    told: list[tuple[int, int, float]] = []
    teach(residual, student, calibration, method, callback=lambda *words: told.append(words))
    assert [done for done, _, _ in told] == list(range(1, EPOCHS * ITERATIONS + 1))
    assert {total for _, total, _ in told} == {EPOCHS * ITERATIONS}
    assert all(loss > 0 for _, _, loss in told)


@pytest.mark.parametrize("plan", ["deploy", "brecq"])
def test_any_plan_can_be_trained(residual: Network, calibration: Samples, plan: str, tmp_path: Path) -> None:
    student = quantize(residual, calibration, bits="W3A8", plan=plan)
    losses: list[float] = []
    settings: dict[str, Any] = {"iterations": 5, "batch": 40, "warm_up": 0, "range_epochs": 0, "learning_rate": 3e-4, "crop": 0.0}
    found = teach(residual, student, calibration, "lrq", callback=lambda *words: losses.append(words[2]), **settings)

    assert losses[-1] < 0.9 * losses[0]
    assert export(found, tmp_path / "out.onnx", calibration).verification.top1_agreement > 95
    kept = [one.grid.scale for one in found.tensors() if one.kind == "activation" and isinstance(one.grid, Grid)]
    given = [one.grid.scale for one in student.tensors() if one.kind == "activation" and isinstance(one.grid, Grid)]
    assert all(torch.equal(one, other) for one, other in zip(kept, given, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_an_onnx_file_comes_back_trained(residual_onnx: Path, calibration: Samples, method: str, tmp_path: Path) -> None:
    network = load(residual_onnx)
    student = quantize(network, calibration, bits="W4A8", plan="zeroq")
    found = teach(network, student, calibration, method)
    assert export(found, tmp_path / "out.onnx", calibration).verification.top1_agreement > 95
    names = {str(node.target) for node in found.network.graph.graph.nodes if notes(node).changed}
    assert any("norm" in name for name in names)


def test_a_network_without_batchnorm_is_trained_and_says_what_is_missing(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    shape = (1, 9, 6)
    layers = [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5)]
    network = capture(fill(nn.Sequential(*layers), shape), shape)
    samples = Samples(images(8, shape))
    student = quantize(network, samples, bits="W3A3")
    for method in METHODS:
        caplog.clear()
        assert not same(teach(network, student, samples, method), student)
        assert "no BatchNorm statistics; the generator learns from the classes alone" in caplog.text


def test_a_network_that_ends_in_a_softmax_learns_as_one_that_does_not(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    shape = (1, 9, 6)
    module = fill(nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5)), shape)
    samples = Samples(images(8, shape), torch.arange(8) % 4)
    weights = []
    for one in (module, nn.Sequential(module, nn.Softmax(1)).eval()):
        network = capture(one, shape)
        student = quantize(network, samples, bits="W4A8", plan="zeroq")
        found = teach(network, student, samples, "lrq", warm_up=0, range_epochs=0)
        weights.append([tensor_of(found.network.graph, tensor.node) for tensor in found.tensors() if tensor.kind == "weight"])
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_one_batch_size_is_trained(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], method: str
) -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:  # such sizes hold for two images alone
                x = 20 * x.reshape(6, -1).softmax(0).reshape(2, 3, 5, 4)
            y: Tensor = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))
            return y

    network = capture(torch.export.export(fill(Bound(), (3, 5, 4)), (torch.zeros(2, 3, 5, 4),)))
    assert network.batch == 2
    samples = Samples(images(5, (3, 5, 4)))
    student = quantize(network, samples, bits="W4A8", plan="zeroq")
    found = teach(network, student, samples, method, batch=3)
    assert found(samples.images).shape == (5, 5)
    assert not same(found, student)


@pytest.mark.parametrize("method", METHODS)
def test_options_come_as_text_too(
    residual: Network, student: Student, calibration: Samples, results: dict[str, Student], method: str
) -> None:
    options = {name: str(parameter.default) for name, parameter in find_method("training", method).options.items()}
    text = options | {name: str(value) for name, value in FEW.items()}
    assert same(train(residual, student, calibration, method=method, **text), results[method])


@pytest.mark.parametrize("method", METHODS)
def test_budgets_are_options_that_the_method_has(method: str) -> None:
    found = find_method("training", method)
    assert found.paper
    assert found.summary.endswith(".")
    published = {name: parameter.default for name, parameter in found.options.items()}
    steps = published["epochs"] * published["iterations"]
    for name in ("standard", "quick"):
        budget = published | found.budget(name)
        assert found.budget(name).keys() <= found.options.keys()
        assert budget["epochs"] > budget["warm_up"] >= budget["range_epochs"]
        assert (budget["range_epochs"] > 0) is (method != "dsg_qat")  # which keeps its samples' ranges
        assert budget["epochs"] * budget["iterations"] < 0.1 * steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gdfk"}, "unknown training method 'gdfk'; did you mean 'gdfq'"),
        ({"epoch": 3}, "'epoch'; did you mean 'epochs'"),
        ({"budget": "quik"}, "unknown budget 'quik'; did you mean 'quick'"),
        ({"epochs": 0}, "epochs is 0 and iterations is 3; both must be at least 1"),
        ({"warm_up": -1}, "cannot be below 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"milestones": "3;4"}, "milestones is '3;4'; write the epochs as 100,200,300"),
        ({"reduction": "sum"}, "unknown reduction 'sum'"),
        ({"generator_rate": 0.0}, "generator_rate is 0.0"),
        ({"batch": 1}, "batch is 1; the generator's BatchNorms need at least two images"),
        ({"method": "lrq", "crop": 1.5}, "crop is 1.5"),
        ({"method": "lrq", "batch": 0}, "batch is 0"),
        ({"method": "dsg_qat", "percentile": 0.0}, "percentile is 0.0"),
        ({"method": "dsg_qat", "slack_images": 0}, "slack_images is 0"),
    ],
)
def test_what_is_not_known_is_refused(
    residual: Network, student: Student, calibration: Samples, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        train(residual, student, calibration, **{**FEW, "method": "gdfq", **given})


def test_samples_must_fit_the_network(residual: Network, student: Student, calibration: Samples) -> None:
    for samples in (Samples(calibration.images[:, :, :5]), replace(calibration, images=calibration.images[:0])):
        with pytest.raises(DataError, match="the network takes"):
            teach(residual, student, samples, "gdfq")


def test_only_lrq_trains_on_the_samples(
    residual: Network, student: Student, calibration: Samples, results: dict[str, Student]
) -> None:
    others = replace(calibration, images=calibration.images.flip(2))
    for method in METHODS:
        assert same(teach(residual, student, others, method), results[method]) == (method in GENERATING)
