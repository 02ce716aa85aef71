"""A run that was stopped, wherever, ends with the bits of one that was not; and a run folder is taken for nothing else."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from dreamquant.errors import OptionError, OutputError
from dreamquant.files import in_use
from dreamquant.flow import run
from dreamquant.methods import SEEDS, check_seed
from dreamquant.network.fingerprint import fingerprint
from dreamquant.network.graph import Network
from dreamquant.samples import Samples, in_order
from dreamquant.synthesis import synthesize

SHAPE = (3, 8, 7)
STEPS = ["synthesis.method=rsd", "synthesis.count=6", "synthesis.held_out=3", "synthesis.steps=2"]
RECONSTRUCTION = ["reconstruction.method=qdrop", "reconstruction.steps=3", "reconstruction.batch=4"]
TRAINING = ["epochs=3", "iterations=2", "batch=4", "warm_up=1", "range_epochs=1", "width=8"]
SETTINGS = [*STEPS, *RECONSTRUCTION, *(f"training.{one}" for one in TRAINING)]


class Stopped(Exception):  # noqa: N818
    """A run ends here."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(fill: Callable[..., nn.Module]) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return fill(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7)), SHAPE)


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dreams as processors with bfloat16 make them."""
    loop = sys.modules["dreamquant.synthesis._loop"]
    monkeypatch.setattr(loop, "arranged", lambda images: images.contiguous(memory_format=torch.channels_last))


def quantized(module: nn.Module, output: Path, folder: Path | None, **options: Any) -> bytes:
    settings = {"recipe": "dsg_qat", "bits": "W4A4", "input_shape": SHAPE, "estimate": False, "settings": SETTINGS}
    run(module, output, run_dir=folder, **(settings | options))
    return output.read_bytes()


def stopping(at: int) -> Callable[..., None]:
    told = 0

    def progress(*_: object) -> None:
        nonlocal told
        told += 1
        if told == at:
            raise Stopped

    return progress


@pytest.mark.usefixtures("channels_last")
@pytest.mark.parametrize(("recipe", "stage", "step"), [("rsd", "reconstructing", 4), ("dsg_qat", "training", 4)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    recipe: str, stage: str, step: int, small: nn.Module, tmp_path: Path
) -> None:
    stages: list[str] = []
    settings = {"recipe": recipe, "settings": SETTINGS if recipe == "dsg_qat" else [*STEPS, *RECONSTRUCTION]}
    whole = quantized(small, tmp_path / "whole.onnx", None, progress=lambda stage, *_: stages.append(stage), **settings)
    output, folder = tmp_path / "out.onnx", tmp_path / "run"
    with pytest.raises(Stopped):
        quantized(small, output, folder, progress=stopping(stages.index(stage) + step), **settings)
    assert not output.exists()
    assert quantized(small, output, folder, **settings) == whole


@pytest.mark.usefixtures("channels_last")
def test_what_is_kept_is_used(small: nn.Module, tmp_path: Path) -> None:
    told: list[list[str]] = [[], []]
    files = [
        quantized(small, tmp_path / "a.onnx", tmp_path / "run", progress=lambda stage, *_, one=one: one.append(stage))
        for one in told
    ]
    assert files[0] == files[1]
    assert told[0]
    assert not told[1]


@pytest.fixture(scope="module")
def first(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, `run`, and its file, `a.onnx`."""
    folder = tmp_path_factory.mktemp("first")
    quantized(small, folder / "a.onnx", folder / "run")
    return folder


@pytest.fixture
def finished(first: Path, tmp_path: Path) -> bytes:
    """A copy of that run's folder; the file that it gave."""
    shutil.copytree(first / "run", tmp_path / "run")
    return (first / "a.onnx").read_bytes()


def test_what_is_damaged_is_made_anew_with_a_word(
    finished: bytes, small: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted((tmp_path / "run").rglob("*.safetensors"))
    assert {"calibration", "held-out", "unit-000", "training"} <= {path.stem for path in files}
    for number, path in enumerate(files):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert quantized(small, tmp_path / "a.onnx", tmp_path / "run") == finished
    for path in files:
        assert caplog.text.count(f"{path} is damaged") == 1


@pytest.mark.usefixtures("finished")
def test_another_number_of_threads_makes_all_anew(small: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    alone = quantized(small, tmp_path / "b.onnx", None)
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert quantized(small, tmp_path / "a.onnx", tmp_path / "run") == alone
    assert "was made with threads 1 where this run has 2" in caplog.text
    assert json.loads((tmp_path / "run" / "result.json").read_text())["threads"] == 2


@pytest.mark.usefixtures("finished")
def test_another_version_makes_all_anew(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("dreamquant.kept.version", lambda _: "0.0.1")
    quantized(small, tmp_path / "a.onnx", tmp_path / "run", progress=lambda stage, *_: told.append(stage))
    assert {"dreaming calibration images", "reconstructing", "training"} <= set(told)


# ---- networks that a sum of absolute weights takes for one another


def changed(network: Network, change: Callable[[fx.GraphModule], None]) -> Network:
    graph = copy.deepcopy(network.graph)
    change(graph)
    return network.with_graph(graph)


def negate(graph: fx.GraphModule) -> None:
    name, tensor = next(iter(graph.named_buffers()))
    setattr(graph, name, -tensor)


def swap(graph: fx.GraphModule) -> None:
    name, tensor = next(iter(graph.named_buffers()))
    setattr(graph, name, tensor.flip(0))


def test_networks_of_the_same_weights_are_told_apart(residual: Network) -> None:
    def padding(graph: fx.GraphModule) -> None:
        node = next(node for node in graph.graph.nodes if "max_pool2d" in str(node.target))
        node.args = (node.args[0], [3, 3], *node.args[2:])

    def operator(graph: fx.GraphModule) -> None:
        node = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.relu.default)
        node.target = torch.ops.aten.silu.default

    def order(graph: fx.GraphModule) -> None:
        node = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.cat.default)
        node.args = (list(reversed(node.args[0])), *node.args[1:])

    others = [changed(residual, change) for change in (negate, swap, padding, operator, order)]
    space = Network(residual.graph, residual.input_shape, residual.source, (0.5,) * 3, (0.5,) * 3, residual.batch)
    found = [fingerprint(network) for network in (residual, *others, space)]
    assert len(set(found)) == len(found)
    assert fingerprint(changed(residual, fx.GraphModule.recompile)) == found[0]


# ---- memory


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (2, 1, 5, 6), (1, 3, 1, 6), (1, 1, 1, 1)])
def test_samples_lie_in_memory_as_they_are_counted(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    for given in (images, images.contiguous(memory_format=torch.channels_last), images.flip(3).transpose(2, 3).transpose(2, 3)):
        other = torch.empty_strided(shape, torch.empty(shape).permute(0, 2, 3, 1).stride()).copy_(given)
        for one in (given, other):
            assert Samples(one).images.stride() == torch.empty(shape).stride()
            assert torch.equal(Samples(one).images, one)
    assert in_order(images) is images


# ---- seeds


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), 7, torch.tensor(7)])
def test_whole_numbers_of_any_kind_are_seeds(seed: Any) -> None:
    assert check_seed(seed) == 7
    assert type(check_seed(seed)) is int


@pytest.mark.parametrize("seed", [-1, SEEDS, True, 1.0, "1", None, np.float64(1), np.bool_(True)])
def test_other_things_are_no_seeds(seed: Any, residual: Network, small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="seed is"):
        synthesize(residual, 2, method="noise", seed=seed)
    with pytest.raises(OptionError, match="seed is"):
        quantized(small, tmp_path / "a.onnx", tmp_path / "run", seed=seed)
    assert not list(tmp_path.glob("*"))


def test_numpy_seeds_and_the_last_one_give_a_file(small: nn.Module, tmp_path: Path) -> None:
    few = {"recipe": "noise", "bits": "W8A8", "settings": STEPS[1:3]}
    assert quantized(small, tmp_path / "a.onnx", None, seed=np.int64(0), **few) == quantized(
        small, tmp_path / "b.onnx", None, **few
    )
    assert quantized(small, tmp_path / "c.onnx", None, seed=SEEDS - 1, **few)


# ---- the run folder


def test_two_runs_at_once_in_one_folder(small: nn.Module, tmp_path: Path) -> None:
    with in_use(tmp_path / "run"), pytest.raises(OutputError, match=r"in use by another run \(process \d+\)"):
        quantized(small, tmp_path / "a.onnx", tmp_path / "run")
    assert not (tmp_path / "a.onnx").exists()
    assert quantized(small, tmp_path / "a.onnx", tmp_path / "run")


def test_a_run_folder_that_cannot_take_the_result(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "run" / "result.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="result.json: it is a folder"):
        quantized(small, tmp_path / "a.onnx", tmp_path / "run")
    assert not (tmp_path / "a.onnx").exists()


def test_a_run_folder_that_fills_up_on_the_way(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10**9

    def fill_up(stage: str, *_: object) -> None:
        if stage == "training":
            Usage.free = 1000

    monkeypatch.setattr("dreamquant.files.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match="result.json: 1.0 MB are needed"):
        quantized(small, tmp_path / "a.onnx", tmp_path / "run", progress=fill_up)
    assert not (tmp_path / "a.onnx").exists()
