"""Networks of every kind that people bring, trained on digits: quantized well, or refused, with what they are fed left unsaid.

The networks, their test images and their scores are those of `shared/kinds`; skipped where that is absent.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import dreamquant
from dreamquant.exporters.onnx_emit import emit_network
from dreamquant.runtime import onnx_runner

COUNT = 200  # test images: one is half a point
POINTS = 2.0  # that so few may be off by; the whole table allows one
FOUND = {  # what tells what each is fed
    "classes_rgb": "measured",
    "classes_mobile": "measured",
    "classes_grey": "measured",
    "classes_grey255": "measured",
    "classes_inside": "graph",
    "classes_nhwc": "measured",
    "regions": "measured",
    "sequence": "measured",
}


@pytest.fixture(scope="module")
def kinds() -> Iterator[tuple[ModuleType, ModuleType]]:
    """`make` and `score` of the folder of kinds."""
    folder = Path(os.environ.get("DREAMQUANT_KINDS", Path(__file__).resolve().parents[2] / "shared" / "kinds"))
    if not (folder / "make.py").is_file():
        pytest.skip("needs the networks of every kind: set DREAMQUANT_KINDS to their folder")
    before, written = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield importlib.import_module("make"), importlib.import_module("score")
    finally:
        sys.path[:], sys.dont_write_bytecode = before, written


def scored(kinds: tuple[ModuleType, ModuleType], kind: str, path: Path, images: torch.Tensor, labels: Any, folder: Path) -> float:
    """The first number of a file's score."""
    np.savez(folder / "data.npz", x=images.numpy(), y=labels.numpy())
    _, score = kinds
    return float(score.score(path, folder / "data.npz", kinds[0].KINDS[kind]["answer"])[1])


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_fed_is_found_and_little_is_lost(kind: str, kinds: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    make, _ = kinds
    pictures, labels = make.data(kind, COUNT, make.TEST, 99)
    images = make.fed(kind, pictures)
    program = torch.export.export(
        make.stored(kind), (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    result = dreamquant.run(tmp_path / "net.pt2", tmp_path / "net.onnx", estimate=False)

    assert result.network.space.known == FOUND[kind]
    assert onnx_runner(tmp_path / "net.onnx").layout == ("NHWC" if kind == "classes_nhwc" else "NCHW")
    (tmp_path / "float.onnx").write_bytes(float_bytes(result))
    before = scored(kinds, kind, tmp_path / "float.onnx", images, labels, tmp_path)
    after = scored(kinds, kind, tmp_path / "net.onnx", images, labels, tmp_path)
    assert after >= before - POINTS


def float_bytes(result: dreamquant.Result) -> bytes:
    """The float network as an ONNX file."""
    return emit_network(result.network).SerializeToString()


def test_a_network_that_tells_nothing_is_refused(kinds: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    make, _ = kinds
    with pytest.raises(dreamquant.DreamQuantError, match="state it, with --mean and --std"):
        dreamquant.run(make.stored("transformer"), tmp_path / "net.onnx", input_shape=(3, 32, 32))
    assert not (tmp_path / "net.onnx").exists()
