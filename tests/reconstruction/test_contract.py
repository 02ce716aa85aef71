"""What every reconstruction method keeps: less error, its own student, the same bits, a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.exporters.export import export
from dreamquant.methods import find_method, method_names
from dreamquant.network.graph import Network
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.reconstruction import reconstruct
from dreamquant.reconstruction._learned import SoftRounding
from dreamquant.reconstruction._store import Spill
from dreamquant.samples import Samples

METHODS = [name for name in method_names("reconstruction") if name != "nearest"]
FEW: dict[str, Any] = {"steps": 60, "batch": 8, "learning_rate": 2e-2}


def options(method: str) -> dict[str, Any]:
    return FEW | ({"activation_steps": 30} if method == "brecq" else {})


@pytest.fixture(scope="module")
def calibration(images: Callable[..., Tensor]) -> Samples:
    return Samples(images(24, (3, 11, 9)))


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W2A4", plan="brecq")


@pytest.fixture(scope="module")
def results(student: Student, calibration: Samples) -> dict[str, Student]:
    return {method: reconstruct(student, calibration, method=method, **options(method)) for method in METHODS}


def state(student: Student) -> dict[str, Tensor]:
    found = dict(student.network.graph.state_dict())
    for tensor in student.tensors():
        assert isinstance(tensor.grid, Grid)
        found[f"{tensor.quantizer.name} scale"] = tensor.grid.scale
    return found


def same(one: Student, other: Student) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def error(network: Network, student: Student, samples: Samples) -> float:
    return (network(samples.images) - student(samples.images)).square().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_are_nearer_to_the_float_networks(
    residual: Network, student: Student, calibration: Samples, results: dict[str, Student], method: str
) -> None:
    assert error(residual, results[method], calibration) < 0.7 * error(residual, student, calibration)


@pytest.mark.parametrize("method", METHODS)
def test_weights_stand_on_their_grids(results: dict[str, Student], method: str) -> None:
    for tensor in results[method].tensors():
        if tensor.kind == "weight" and tensor.grid.bits == 2:
            weight = results[method].network.graph.get_buffer(str(tensor.node.target))
            torch.testing.assert_close(tensor.grid.fake(weight), weight)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_student_is_left_and_the_same_seed_gives_the_same_bits(
    student: Student, calibration: Samples, results: dict[str, Student], method: str
) -> None:
    before = {name: value.clone() for name, value in state(student).items()}
    again = reconstruct(student, calibration, method=method, **options(method))
    other = reconstruct(student, calibration, method=method, seed=1, **options(method))

    assert same(again, results[method])
    assert not same(other, results[method])
    assert all(torch.equal(value, before[name]) for name, value in state(student).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    student: Student, calibration: Samples, results: dict[str, Student], method: str, tmp_path: Path
) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        if done == 0.6 * total // 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(student, calibration, method=method, folder=tmp_path, callback=stop, **options(method))
    done = len(list(tmp_path.rglob("*.safetensors")))
    assert done > 1
    steps: list[int] = []
    found = reconstruct(
        student,
        calibration,
        method=method,
        folder=tmp_path,
        callback=lambda *numbers: steps.append(numbers[0]),
        **options(method),
    )
    assert same(found, results[method])
    assert steps[0] > 60
    assert len(list(tmp_path.rglob("*.safetensors"))) > done


def test_units_of_another_run_are_not_taken(
    student: Student, calibration: Samples, results: dict[str, Student], tmp_path: Path
) -> None:
    reconstruct(student, calibration, method="adaround", folder=tmp_path, seed=5, **FEW)
    found = reconstruct(student, calibration, method="adaround", folder=tmp_path, **FEW)
    assert same(found, results["adaround"])


@pytest.mark.parametrize("method", METHODS)
def test_the_file_does_what_the_student_does(
    results: dict[str, Student], calibration: Samples, method: str, tmp_path: Path
) -> None:
    artifact = export(results[method], tmp_path / "out.onnx", calibration)
    assert artifact.verification.top1_agreement > 95


@pytest.mark.parametrize("method", METHODS)
def test_progress_ends_at_the_total(student: Student, calibration: Samples, method: str) -> None:
    told: list[tuple[int, int, float]] = []
    few = options(method) | {"steps": 3} | ({"activation_steps": 2} if method == "brecq" else {})
    reconstruct(student, calibration, method=method, callback=lambda *words: told.append(words), **few)
    numbers = [done for done, _, _ in told]
    assert numbers == list(range(1, told[-1][1] + 1))


@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
def test_any_plan_can_be_reconstructed(residual: Network, calibration: Samples, plan: str, tmp_path: Path) -> None:
    student = quantize(residual, calibration, bits="W2A8", plan=plan)
    found = reconstruct(student, calibration, method="qdrop", steps=200, batch=8, learning_rate=1e-2)
    assert error(residual, found, calibration) < error(residual, student, calibration)
    assert export(found, tmp_path / "out.onnx", calibration).verification.top1_agreement > 95


def test_eight_bits_are_left_as_they_are(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W8A8", plan="brecq")
    steps: list[int] = []
    found = reconstruct(student, calibration, callback=lambda *numbers: steps.append(numbers[0]), **FEW)
    assert not steps
    assert torch.equal(found(calibration.images), student(calibration.images))


def test_large_tensors_are_mapped_from_files_and_change_nothing(
    student: Student, calibration: Samples, results: dict[str, Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = []
    original = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: mapped.append(args) or original(*args, **kwargs))
    monkeypatch.setattr("dreamquant.reconstruction._loop.Spill", lambda _: Spill(1e4))
    found = reconstruct(student, calibration, method="qdrop", **FEW)
    assert mapped
    assert same(found, results["qdrop"])


def test_a_unit_too_large_is_learnt_layer_by_layer_and_says_so(
    student: Student, calibration: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []
    few = FEW | {"steps": 2}
    reconstruct(student, calibration, method="qdrop", callback=lambda *numbers: steps.append(numbers[1]), **few)
    whole = steps[-1]
    reconstruct(student, calibration, method="qdrop", memory=1e-5, callback=lambda *numbers: steps.append(numbers[1]), **few)
    assert steps[-1] > whole
    assert "its 2 layers are learnt one by one" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "genie"}, "unknown reconstruction method 'genie'; did you mean 'genie_m'"),
        ({"step": 3}, "'step'; did you mean 'steps'"),
        ({"unit": "blok"}, "unknown unit 'blok'"),
        ({"budget": "quik"}, "unknown budget 'quik'; did you mean 'quick'"),
    ],
)
def test_what_is_not_known_is_refused(student: Student, calibration: Samples, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        reconstruct(student, calibration, **given)


@pytest.mark.parametrize("method", METHODS)
def test_budgets_are_options_that_the_method_has(method: str) -> None:
    found = find_method("reconstruction", method)
    for name in ("quick", "standard"):
        assert found.budget(name)
        assert found.budget(name).keys() <= found.options.keys()


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_a_short_budget_weighs_the_regulariser_more_so_that_fewer_roundings_are_left_undecided(
    student: Student, calibration: Samples, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided: list[Tensor] = []
    rounded = SoftRounding.rounded

    def look(module: SoftRounding) -> tuple[Tensor, Grid]:
        undecided.append(((module.soft() > 0.02) & (module.soft() < 0.98)).flatten())
        return rounded(module)

    def share(**options: Any) -> float:
        undecided.clear()
        reconstruct(student, calibration, method=method, budget="quick", **options)
        return torch.cat(undecided).float().mean().item()

    monkeypatch.setattr(SoftRounding, "rounded", look)
    published = find_method("reconstruction", method).options["regulariser"].default

    assert share() < 0.8 * share(regulariser=published)
