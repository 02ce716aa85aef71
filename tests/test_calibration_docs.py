"""docs/calibration.md, run as it stands: its commands and its Python, in order, with the real tools."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import load_labelled
from dreamquant.runtime import onnx_runner

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "calibration.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
STEP = re.compile(r"^```python\n(?P<python>.*?)^```$|^    (?P<command>dreamquant .*?)$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def follow(command: Callable[..., Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`follow(heading)` does what a section says, in a folder with nothing but the example, and gives its names."""
    shutil.copytree(digits, tmp_path / "examples" / "digits")
    monkeypatch.chdir(tmp_path)

    def run(heading: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for step in STEP.finditer(SECTIONS[heading]):
            if step["python"]:
                exec(step["python"], names)
            else:
                finished = command(*shlex.split(step["command"])[1:])
                assert finished.status == 0, finished.err
        return names

    return run


def top1(path: Path, digits: Path) -> float:
    data = load_labelled(digits / "digits_test.npz")
    return evaluate(onnx_runner(path), data, input_shape=(1, 16, 16), mean=(0.3054,), std=(0.3187,)).top1


def test_onnx_runtime(follow: Callable[[str], Any], digits: Path) -> None:
    follow("ONNX Runtime")
    assert top1(Path("digits.ort.onnx"), digits) > 97


def test_nncf(follow: Callable[[str], Any], digits: Path) -> None:
    pytest.importorskip("nncf", reason="needs the extra dreamquant[nncf]")
    follow("NNCF")
    assert top1(Path("digits.nncf.onnx"), digits) > 97


def test_modelopt(follow: Callable[[str], Any]) -> None:
    assert follow("NVIDIA ModelOpt")["inputs"] == ["input"]


def test_folder(follow: Callable[[str], Any]) -> None:
    names = follow("A folder of PNGs")
    assert names["images"].shape == (20, 1, 16, 16)
    assert names["images"].dtype == np.float32
    assert sorted(int(row["label"]) for row in names["rows"]) == sorted(2 * list(range(10)))
    assert 0 < names["settings"]["clipped"] < 1


def test_every_section_has_its_test() -> None:
    assert list(SECTIONS) == ["ONNX Runtime", "NNCF", "NVIDIA ModelOpt", "A folder of PNGs"]


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert targets
    assert all((ROOT / "docs" / target).exists() for target in targets)
