"""Every command on the digits network, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file

import dreamquant
from dreamquant.methods import find_method, method_names
from dreamquant.quantization.plan import plan_names
from dreamquant.recipe import recipe_names

FOLDED = "digits_bnfolded.onnx"
FEW = ("--set", "synthesis.count=8", "--set", "synthesis.held_out=8")
PLAIN = ("--set", "synthesis.method=fractal", "--set", "reconstruction.method=nearest")
FAST = (*FEW, "--set", "synthesis.steps=2")
PROVED = "--no-estimate"  # the estimate takes longer than all else, and is of `test_quantize` and of `test_flow`
LEARNED = ("--set", "reconstruction.steps=20")
Command = Callable[..., Any]


def works(command: Command, *arguments: object) -> str:
    """The command's output; it must end well and leave nothing on the error stream."""
    finished = command(*arguments)
    assert finished.err == ""
    assert finished.status == 0
    return str(finished.out)


def quantized_tensors(path: Path) -> list[str]:
    return [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize(("model", "options"), [("digits.pt2", FAST), (FOLDED, FEW)])
def test_quantize(model: str, options: tuple[str, ...], command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    shown = works(command, "quantize", digits / model, "-o", output, *options)
    onnx.checker.check_model(output, full_check=True)
    assert quantized_tensors(output)
    assert list(tmp_path.iterdir()) == [output]
    for word in ("file", "proof", "agreement", "weakest layers", "size", "latency", "calibrated on", "W8A8", "8 images"):
        assert word in shown
    assert str(output) in "".join(line.strip() for line in shown.splitlines())  # long names are folded, never cut


def test_quantize_json(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    found = json.loads(works(command, "quantize", digits / FOLDED, "-o", output, *FEW, *LEARNED, "--bits", "W4A4", "--json"))
    assert found["file"] == str(output)
    assert found["bytes"] == output.stat().st_size
    assert found["size_ratio"] == found["bytes"] / (digits / FOLDED).stat().st_size
    assert found["verification"]["samples"] == 8
    assert found["recipe"]["quantization"]["bits"] == "W4A4"
    assert found["seed"] == 0
    assert set(found["versions"]) >= {"dreamquant", "torch", "onnxruntime"}
    assert all(seconds >= 0 for seconds in found["seconds"].values())


def test_quantize_quiet_still_tells_the_result(command: Command, digits: Path, tmp_path: Path) -> None:
    assert "proof" in works(command, "quantize", digits / FOLDED, "-o", tmp_path / "out.onnx", *FEW, PROVED, "--quiet")


def test_settings_reach_the_run(command: Command, digits: Path, tmp_path: Path) -> None:
    settings = (
        "synthesis.method=noise",
        "synthesis.count=3",
        "synthesis.held_out=5",
        "quantization.activation_ranges=percentile",
        "quantization.activation_options.percent=99",
    )
    arguments = [part for setting in settings for part in ("--set", setting)]
    output = tmp_path / "out.onnx"
    found = json.loads(works(command, "quantize", digits / FOLDED, "-o", output, *arguments, "--plan", "brecq", PROVED, "--json"))
    assert found["recipe"]["synthesis"] == {"method": "noise", "count": 3, "held_out": 5, "widen": False}
    assert found["recipe"]["quantization"] == {
        "plan": "brecq",
        "bits": "W8A8",
        "activation_ranges": "percentile",
        "activation_options": {"percent": 99},
    }
    assert found["verification"]["samples"] == 3
    assert found["agreement"]["samples"] == 5


def test_layers_of_their_own(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    chosen = (PROVED, "--keep-float", "conv2d_3", "--bits-for", "conv2d_1=6", "--bits-for", "conv2d_2=W8A7")
    found = json.loads(
        works(command, "quantize", digits / FOLDED, "-o", output, *FEW, *PLAIN, "--bits", "W4A8", *chosen, "--json")
    )
    assert found["float_layers"] == ["conv2d_3"]
    assert found["recipe"]["quantization"]["layers"] == {
        "conv2d_3": {"keep_float": True},
        "conv2d_1": {"weight_bits": 6, "input_bits": 6},
        "conv2d_2": {"weight_bits": 8, "input_bits": 7},
    }
    stored = [tensor.data_type for tensor in onnx.load(output).graph.initializer if tensor.name.endswith("_q")]
    assert stored.count(onnx.TensorProto.INT8) == 4  # the first and the last layer, and two with more bits than four
    assert "left in float" in works(command, "quantize", digits / FOLDED, "-o", output, *FEW, *chosen)


def test_agreement_raises_layers_until_it_is_reached(command: Command, digits: Path, tmp_path: Path) -> None:
    arguments = (
        "quantize",
        digits / FOLDED,
        "-o",
        tmp_path / "out.onnx",
        "--set",
        "synthesis.count=32",
        *PLAIN,
        "--set",
        "synthesis.method=anchored",  # on which the network is sure enough of itself
        "--bits",
        "W2A4",
        PROVED,
    )
    plain = json.loads(works(command, *arguments, "--json"))
    raised = json.loads(works(command, *arguments, "--agreement", "90", "--json"))
    assert plain["agreement"]["top1"] < raised["agreement"]["top1"]
    assert raised["recipe"]["allocation"]["method"] == "auto"
    assert plain["bytes"] < raised["bytes"]
    few = ("--set", "synthesis.count=8", "--set", "synthesis.method=fractal")
    assert "auto: " in works(command, *arguments, *few, "--agreement", "90")


def test_the_file_tells_how_it_was_made(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    works(command, "quantize", digits / FOLDED, "-o", output, *FEW, PROVED, "--seed", "7")
    properties = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    made = json.loads(properties["dreamquant.run"])
    assert made["seed"] == 7
    assert made["recipe"]["synthesis"]["method"] == "fractal"
    assert properties["dreamquant.bits"] == "W8A8"
    assert properties["dreamquant.mean"] == "0.3054"


def test_budget(command: Command, digits: Path, tmp_path: Path) -> None:
    arguments = ("quantize", digits / "digits.pt2", "-o", tmp_path / "out.onnx", *FEW, PROVED, "--budget", "quick", "--json")
    synthesis = json.loads(works(command, *arguments))["recipe"]["synthesis"]
    assert synthesis["count"] == 8  # the user's word is the last
    assert synthesis["steps"] == find_method("synthesis", "rsd").budget("quick")["steps"]


def test_recipe_file(command: Command, digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('summary = "mine"\n[synthesis]\nmethod = "noise"\ncount = 4\nheld_out = 4\n')
    output = tmp_path / "out.onnx"
    found = json.loads(works(command, "quantize", digits / FOLDED, "-o", output, "--recipe", recipe, PROVED, "--json"))
    assert found["recipe"]["name"] == "mine"
    assert found["recipe"]["synthesis"]["method"] == "noise"


def test_same_seed_same_file(command: Command, digits: Path, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((3, 3, 4)):
        output = tmp_path / f"{number}.onnx"
        works(command, "quantize", digits / FOLDED, "-o", output, *FEW, PROVED, "--seed", seed)
        files.append(output.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_run_dir_goes_on(command: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, output = tmp_path / "a" / "run", tmp_path / "out.onnx"
    arguments = ("quantize", digits / FOLDED, "-o", output, *FEW, "--run-dir", run_dir)
    works(command, *arguments)
    assert {path.name for path in run_dir.iterdir()} == {
        "calibration.safetensors",
        "held-out.safetensors",
        "procedural.safetensors",
        "dreamt.safetensors",
        "result.json",
    }
    assert json.loads((run_dir / "result.json").read_text())["file"] == str(output)
    first = output.read_bytes()

    asked = []
    real = dreamquant.synthesize

    def counted(*given: Any, **options: Any) -> Any:
        asked.append(options["seed"])
        return real(*given, **options)

    monkeypatch.setattr(sys.modules["dreamquant.flow"], "synthesize", counted)
    works(command, *arguments)
    assert asked == []
    assert output.read_bytes() == first


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".png"])
def test_synthesize(suffix: str, command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / f"dreams{suffix}"
    options = ("--method", "fractal", "-n", "6", "--set", "leaves=20", "--quiet")
    finished = command("synthesize", digits / FOLDED, "-o", output, *options)
    assert finished.status == 0
    assert "6 images by fractal" in finished.err
    if suffix == ".png":
        with Image.open(output) as sheet:
            assert sheet.size == (8 * 18, 18)
        return
    images = load_file(output)["images"] if suffix == ".safetensors" else np.load(output)["images"]
    assert images.shape == (6, 1, 16, 16)
    assert images.dtype == np.float32


def test_synthesize_a_folder(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "dreams"
    arguments = ("synthesize", digits / "digits.pt2", "-o", output, "--method", "rsd", "-n", "4", "--set", "steps=1", "--quiet")
    assert command(*arguments).status == 0
    settings = json.loads((output / "samples.json").read_text())
    assert (settings["method"], settings["seed"]) == ("rsd", 0)
    assert settings["options"] == find_method("synthesis", "rsd").budget("standard") | {"steps": 1}
    assert len(settings["losses"]) == 1
    assert (output / "labels.csv").read_text().splitlines()[0] == "file,label,confidence"
    assert command(*arguments).status == 0  # such a folder may be replaced
    found = json.loads(works(command, "evaluate", digits / FOLDED, output, "--labels", output / "labels.csv", "--json"))
    assert found["images"] == 4


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (FOLDED, ("--for", "modelopt"), "input"),
        (FOLDED, ("--for", "modelopt", "--input-name", "x:0"), "x:0"),
        (FOLDED, ("--input-name", "pixels"), "pixels"),
        ("digits.pt2", ("--for", "modelopt", "--input-name", "pixels"), "pixels"),
    ],
)
def test_synthesize_for_another_tool(
    model: str, options: tuple[str, ...], name: str, command: Command, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calib.npz"
    assert command("synthesize", digits / model, "-o", output, "--method", "noise", "-n", "3", *options).status == 0
    with np.load(output, allow_pickle=False) as file:
        assert file.files == [name]
        assert (file[name].shape, file[name].dtype) == ((3, 1, 16, 16), np.float32)


def test_synthesize_labels(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "dreams.npz"
    command("synthesize", digits / "digits.pt2", "-o", output, "--method", "rsd", "-n", "10", "--set", "steps=1")
    assert sorted(np.load(output)["labels"]) == list(range(10))


@pytest.mark.parametrize("model", ["digits.pt2", FOLDED, "network"])
def test_evaluate(model: str, command: Command, digits: Path) -> None:
    data = digits / "digits_test.npz"
    named: list[object] = [digits / model]
    options: list[object] = []
    if model == "network":
        named = [f"{digits.parent / 'digits_network.py'}:network"]
        options = ["--input-shape", "1,16,16", "--mean", "0.3054", "--std", "0.3187"]
    found = json.loads(works(command, "evaluate", *named, data, *options, "--json"))
    assert found["images"] == 597
    assert found["top1"] == 100.0
    if model == FOLDED:
        assert "top-1 100.00 %" in works(command, "evaluate", *named, data)


def test_evaluate_by_lists_of_classes(command: Command, digits: Path, tmp_path: Path) -> None:
    images, labels = (np.load(digits / "digits_test.npz")[name][:40] for name in "xy")
    np.savez(tmp_path / "lists.npz", x=images, y=labels[:, None] == np.arange(10))
    stated = ("--outputs", "logits=multilabel")
    found = json.loads(works(command, "evaluate", digits / FOLDED, tmp_path / "lists.npz", *stated, "--json"))
    assert (found["kind"], found["images"]) == ("multilabel", 40)
    assert 60 < found["figures"]["F1"] < 100  # logits above zero, not the largest one
    assert "multilabel: F1 " in works(command, "evaluate", digits / FOLDED, tmp_path / "lists.npz", *stated)


def test_evaluate_what_was_quantized(command: Command, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    works(command, "quantize", digits / FOLDED, "-o", output, "--set", "synthesis.count=32", PROVED, "--json")
    found = json.loads(works(command, "evaluate", output, digits / "digits_test.npz", "--json", "--batch", "100"))
    assert found["top1"] > 95


def test_inspect(command: Command, digits: Path) -> None:
    found = json.loads(works(command, "inspect", digits / "digits.pt2", "--json"))
    assert found["input_shape"] == [1, 16, 16]
    assert found["batch"] is None
    assert len(found["layers"]) == 10
    assert len(found["batch_norms"]) == 9
    assert found["segments"]
    assert set(found["synthesis"]) == set(method_names("synthesis"))
    assert [name for name, possible in found["synthesis"].items() if not possible] == ["psaq"]
    assert found["attentions"] == []
    shown = works(command, "inspect", digits / FOLDED, "--plan", "brecq", "--bits", "W4A4")
    assert "0 BatchNorms (folded, or never there)" in shown
    assert "synthesis zeroq: needs BatchNorm statistics, and there are none" in shown
    assert "synthesis psaq: needs attention, and there is no softmax" in shown


def test_inspect_ranks_layers(command: Command, digits: Path) -> None:
    arguments = ("inspect", digits / FOLDED, "--bits", "W4A4", "--sensitivity")
    found = json.loads(works(command, *arguments, "--json"))["sensitivity"]
    damage = [layer["weights"] + layer["activations"] for layer in found]
    assert len(found) == 10
    assert damage == sorted(damage, reverse=True)
    assert min(damage) > 0
    shown = works(command, *arguments)
    assert "what each costs alone" in shown
    assert f"{found[0]['weights']:.2e}" in shown


def test_compare(command: Command, digits: Path, tmp_path: Path) -> None:
    model, output, dreams = digits / FOLDED, tmp_path / "out.onnx", tmp_path / "dreams.npz"
    works(command, "quantize", model, "-o", output, *FEW, *PLAIN, PROVED, "--bits", "W4A4")
    command("synthesize", model, "-o", dreams, "--method", "fractal", "-n", "9", "--seed", "1")
    found = json.loads(works(command, "compare", model, output, "--samples", dreams, "--rounds", "1", "--json"))
    assert found["b"]["bytes"] == output.stat().st_size
    assert found["size_ratio"] == output.stat().st_size / model.stat().st_size
    assert (found["a"]["floats"], found["b"]["quantized"]) == ({"Conv": 9, "Gemm": 1}, {"Conv": 9, "Gemm": 1})
    assert (found["count"], found["images"], found["matched"]) == (9, "9 samples", "name")
    assert (found["latency"]["rounds"], found["latency"]["threads"], found["latency"]["batch"]) == (1, 1, 1)
    assert (found["accuracy"], found["notes"]) == (None, [])
    assert found["outputs"][0]["name"] == "logits"
    data = digits / "digits_test.npz"
    accuracy = json.loads(works(command, "compare", model, output, "--data", data, "--rounds", "1", "--json"))["accuracy"]
    evaluated = json.loads(works(command, "evaluate", output, data, "--json"))
    assert (accuracy["b_top1"], accuracy["b_top5"]) == (evaluated["top1"], evaluated["top5"])
    assert (accuracy["a_top1"], accuracy["images"]) == (100, 597)
    shown = works(command, "compare", model, output, "--data", data, "--rounds", "1")
    assert f"{accuracy['difference']:+.2f} points" in " ".join(shown.split())
    for word in ("9 Conv", "int4", "times as fast", "top-5", "right alone", "logits (N,", "relative L2", "KL", "SQNR"):
        assert word in shown


def test_compare_says_what_the_images_are(command: Command, digits: Path) -> None:
    shown = works(command, "compare", digits / FOLDED, digits / FOLDED, "-n", "3", "--rounds", "1", "--quiet")
    assert "B against A on 3 procedural images (dead leaves under 1/f texture, seed 0)" in shown
    assert "note: neither samples nor data were given" in shown
    assert "100.00 %" in shown
    assert "top-5" not in shown


def test_recipes_and_methods(command: Command) -> None:
    found = json.loads(works(command, "recipes", "--json"))
    assert [recipe["name"] for recipe in found] == recipe_names()
    assert json.loads(works(command, "methods", "--json"))["synthesis"] == method_names("synthesis")
    shown = works(command, "recipes")
    assert all(name in shown for name in recipe_names())
    shown = works(command, "methods")
    assert all(name in shown for family in ("synthesis", "ranges") for name in method_names(family))


@pytest.mark.parametrize("name", ["quantize", "synthesize", "dreams", "evaluate", "inspect", "compare", "recipes", "methods"])
def test_help(name: str, command: Command) -> None:
    assert f"dreamquant {name}" in works(command, name, "--help")


def test_help_names_every_plan(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = works(command, "quantize", "--help")
    assert all(name in shown for name in plan_names())


def test_entry_points(digits: Path, tmp_path: Path) -> None:
    """The real process: what it prints, its status, and nothing of the libraries' warnings."""
    script = Path(sys.executable).with_name("dreamquant")
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    arguments = ["quantize", str(digits / "digits.pt2"), "-o", str(tmp_path / "out.onnx"), *FAST]
    good = subprocess.run([script, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert "proof" in good.stdout
    module = [sys.executable, "-m", "dreamquant", "quantize", "nothing.onnx", "-o", "out.onnx"]
    bad = subprocess.run(module, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "dreamquant: nothing.onnx: there is no such file\n"
