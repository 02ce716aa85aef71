"""An export is proven before it takes its place, and says what it is."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch

from dreamquant.errors import DreamQuantError, OptionError, OutputError, VerificationError
from dreamquant.exporters.export import check_format, export
from dreamquant.exporters.verify import Verification
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.output_properties import of_properties
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples

MODULE = sys.modules["dreamquant.exporters.export"]  # the package's `export` is the function


@pytest.fixture(scope="module")
def student(residual: Network, calibration: Samples) -> Student:
    return quantize(residual, calibration, bits="W4A8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_and_the_artifact_tells_of_it(student: Student, calibration: Samples, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    artifact = export(student, path, calibration, metadata={"note": "mine"})
    actual = torch.from_numpy(onnx_runner(path)(calibration.images.numpy()))

    assert artifact.path == path
    assert artifact.size == path.stat().st_size
    assert artifact.verification.samples == len(calibration)
    assert artifact.verification.largest_difference == pytest.approx(
        (student(calibration.images) - actual).abs().max().item(), abs=1e-6
    )
    assert names(tmp_path) == ["model.onnx"]
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["dreamquant.bits"] == "W4A8"
    assert properties["dreamquant.plan"] == "deploy"
    assert properties["note"] == "mine"
    assert of_properties(properties, [output.name for output in student.network.outputs]) == student.network.outputs


def test_the_same_student_gives_the_same_bytes(student: Student, calibration: Samples, tmp_path: Path) -> None:
    one, other = tmp_path / "one.onnx", tmp_path / "other.onnx"
    export(student, one, calibration)
    export(student, other, calibration)

    assert one.read_bytes() == other.read_bytes()


def test_normalisation_goes_into_the_file_and_comes_back(
    residual_module: torch.nn.Module, calibration: Samples, tmp_path: Path
) -> None:
    network = load(residual_module, input_shape=(3, 11, 9), mean=(0.1, 0.2, 1 / 3), std=(1.0, 0.7, 0.25), force=True)
    path = tmp_path / "model.onnx"
    export(quantize(network, calibration), path, calibration)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}

    assert tuple(map(float, properties["dreamquant.mean"].split(","))) == network.mean
    assert tuple(map(float, properties["dreamquant.std"].split(","))) == network.std


@pytest.mark.parametrize("error", [VerificationError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_the_output_as_it_was(
    student: Student, calibration: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "model.onnx"
    if existing:
        path.write_bytes(b"precious")

    def fail(*_: object) -> Verification:
        raise error

    monkeypatch.setattr(MODULE, "verify", fail)
    with pytest.raises(type(error)):
        export(student, path, calibration)
    assert names(tmp_path) == (["model.onnx"] if existing else [])
    assert not existing or path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["model.pt2", "model", "model.onnx.txt", "model.tflite"])
def test_another_suffix_is_refused(student: Student, calibration: Samples, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"its suffix must tell the format \(known: \.onnx\)") as caught:
        export(student, tmp_path / name, calibration)
    assert name in str(caught.value)
    with pytest.raises(OptionError):
        check_format(tmp_path / name)
    assert names(tmp_path) == []


def test_a_missing_folder_is_refused(student: Student, calibration: Samples, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="absent"):
        export(student, tmp_path / "absent" / "model.onnx", calibration)


def test_a_model_too_large_for_one_file_is_refused(
    student: Student, calibration: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "LARGEST_PROTO", 1000)
    with pytest.raises(DreamQuantError, match="one ONNX file holds 2 GB"):
        export(student, tmp_path / "model.onnx", calibration)
    assert names(tmp_path) == []
