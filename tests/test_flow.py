"""The whole flow: a file, what is known of it, the same again from the same seed, and nothing at all where it fails."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from dreamquant.errors import DreamQuantError, OptionError, OutputError, VerificationError
from dreamquant.flow import Result, run
from dreamquant.network.fingerprint import fingerprint
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.recipe import load_recipe, resolve

MODULE = sys.modules["dreamquant.flow"]
FEW = ["synthesis.count=6", "synthesis.held_out=4"]


def quick(model: object, output: Path, **options: Any) -> Result:
    return run(model, output, **{"budget": "quick", "settings": FEW, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folded(digits: Path) -> Path:
    return digits / "digits_bnfolded.onnx"


def test_the_flow(folded: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    told: list[tuple[str, int, int, float]] = []
    result = quick(folded, output, run_dir=tmp_path / "run", progress=lambda *words: told.append(words))

    assert result.artifact.path == output
    assert result.artifact.size == output.stat().st_size < 0.5 * folded.stat().st_size
    assert result.artifact.verification.top1_agreement > 99
    assert result.assessment.agreement.samples == 4
    assert len(result.samples) == 6
    assert result.recipe == resolve(load_recipe("auto"), has_batchnorm=False, budget="quick", settings=FEW)
    assert set(result.seconds) == {
        "synthesis",
        "held_out_synthesis",
        "choice",
        "allocation",
        "fastest",
        "quantization",
        "reconstruction",
        "training",
        "export",
        "probe_synthesis",
        "assessment",
    }
    asked = {"calibration", "held-out", "procedural", "dreamt"}
    assert {stage for stage, *_ in told} == {f"dreaming {what} images" for what in asked} | {"choosing ranges"}
    assert {file.stem for file in (tmp_path / "run").glob("*.safetensors")} == asked
    trust = result.assessment.trust
    assert trust is not None
    assert [probe.method for probe in result.assessment.probes] == ["fractal", "anchored"]
    assert 0 <= trust.low <= trust.drop <= trust.high <= 100
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary == json.loads(json.dumps(result.summary()))
    assert summary["recipe"]["quantization"]["bits"] == "W8A8"
    made = json.loads(next(e.value for e in onnx.load(output).metadata_props if e.key == "dreamquant.run"))
    assert made["seed"] == 0
    assert made["recipe"]["synthesis"]["method"] == result.recipe.synthesis.method
    assert made["versions"]["onnx"] == onnx.__version__
    assert made["ranges"] == result.choice.sentence() != ""


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(folded: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.onnx" for index in range(3)]
    for path, (seed, estimate) in zip(files, ((3, True), (3, False), (4, False)), strict=True):
        quick(folded, path, seed=seed, estimate=estimate)

    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_a_run_goes_on_from_its_samples(folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, folder = tmp_path / "one.onnx", tmp_path / "other.onnx", tmp_path / "run"
    quick(folded, one, run_dir=folder)
    synthesize, calls = MODULE.synthesize, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        return synthesize(*args, **options)

    monkeypatch.setattr(MODULE, "synthesize", counted)
    quick(folded, other, run_dir=folder)
    assert calls == []
    assert one.read_bytes() == other.read_bytes()
    (folder / "held-out.safetensors").write_bytes(b"half written")
    quick(folded, other, run_dir=folder)
    assert calls == [1]  # the broken one is made anew, the other is kept
    quick(folded, other, run_dir=folder, seed=5)
    assert calls == [1, 5, 6, 7, 7]  # and another seed's are not taken for this one's
    quick(folded, other, run_dir=folder, bits="W6A8", seed=5)
    assert calls == [1, 5, 6, 7, 7]  # bits do not change the images


def test_samples_of_another_network_are_not_taken(folded: Path, digits: Path, tmp_path: Path) -> None:
    settings = [*FEW, "synthesis.method=rsd", "synthesis.steps=2"]
    results = [
        quick(digits / name, tmp_path / "out.onnx", run_dir=tmp_path / "run", settings=settings, estimate=False).samples.images
        for name in ("digits.pt2", "digits_bnfolded.onnx")
    ]
    assert not results[0].equal(results[1])


def test_networks_are_told_apart(residual: Network, digits: Path) -> None:
    assert fingerprint(residual) == fingerprint(residual)
    assert fingerprint(residual) != fingerprint(load(digits / "digits.pt2"))


def test_a_module_is_quantized_as_a_file_is(residual_module: Any, tmp_path: Path) -> None:
    settings = [*FEW, "synthesis.steps=2", "reconstruction.steps=20"]
    result = run(residual_module, tmp_path / "out.onnx", input_shape=(3, 11, 9), bits="W4A4", settings=settings)

    assert result.recipe.synthesis.method == load_recipe("auto").synthesis.method
    assert result.summary()["recipe"]["quantization"]["bits"] == "W4A4"


FAILURES: dict[str, tuple[dict[str, Any], type[DreamQuantError]]] = {
    "setting": ({"settings": ["synthesis.stepps=1"]}, OptionError),
    "bits": ({"bits": "banana"}, OptionError),
    "plan": ({"plan": "banana"}, OptionError),
    "recipe": ({"recipe": "banana"}, OptionError),
    "budget": ({"budget": "banana"}, OptionError),
    "normalisation": ({"mean": (0.5,)}, OptionError),
    "no batchnorm": ({"recipe": "zeroq"}, OptionError),
}


@pytest.mark.parametrize("name", list(FAILURES))
@pytest.mark.parametrize("existing", [True, False])
def test_mistakes_are_found_before_the_work_and_leave_the_output_alone(
    folded: Path, tmp_path: Path, name: str, existing: bool
) -> None:
    options, kind = FAILURES[name]
    output = tmp_path / "out.onnx"
    if existing:
        output.write_bytes(b"precious")
    with pytest.raises(kind) as caught:
        quick(folded, output, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["out.onnx"] if existing else [])
    assert not existing or output.read_bytes() == b"precious"


def test_a_file_that_is_not_true_is_never_put_in_place(folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise VerificationError("it is not true")

    monkeypatch.setattr(sys.modules["dreamquant.exporters.export"], "verify", fail)
    output = tmp_path / "out.onnx"
    output.write_bytes(b"precious")
    with pytest.raises(VerificationError):
        quick(folded, output)
    assert output.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_the_input_is_never_overwritten(folded: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(folded, model)
    with pytest.raises(OutputError, match="it is the input"):
        quick(model, model)
    assert model.read_bytes() == folded.read_bytes()


def test_a_run_folder_that_is_a_file_is_refused(folded: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"precious")
    with pytest.raises(OutputError, match="run"):
        quick(folded, tmp_path / "out.onnx", run_dir=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["out", "out.pt2", "out.txt"])
def test_formats_that_are_not_known(folded: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"known: \.onnx"):
        quick(folded, tmp_path / name)


def test_no_estimate_where_nobody_asks_or_there_are_no_classes(folded: Path, tmp_path: Path) -> None:
    assert quick(folded, tmp_path / "a.onnx", estimate=False).assessment.trust is None
    dense = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)).eval()
    found = quick(dense, tmp_path / "b.onnx", recipe="noise", input_shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
    assert found.assessment.trust is None
    assert found.summary()["trust"] is None
    assert "no output of scores of classes" in found.summary()["trust_unknown"][0]


def test_no_estimate_where_the_input_space_was_only_measured(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: Any, **kwargs: Any) -> Network:
        network = load(*args, **kwargs)
        return replace(network, space=replace(network.space, known="measured"))

    monkeypatch.setattr(MODULE, "load", measured)
    found = quick(folded, tmp_path / "a.onnx")
    assert (found.assessment.trust, found.assessment.probes) == (None, [])
    assert "only measured" in found.summary()["trust_unknown"][0]
