"""The suite of all networks: what it measures of the network that lies in the project, and what its tables make of rows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import zoo
from benchmarks.zoo_tables import holds, tables

DIGITS = ["benchmarks.zoo", "--data", "nowhere", "--only", "digits", "--methods", "float", "--count", "50"]


def row(method: str, value: float, metric: str = "top-1", **more: Any) -> dict[str, Any]:
    names = {"network": "squeezenet", "method": method, "label": "", "count": None}
    return names | {"metric": metric, "value": value, "test_images": 1000, "distance": 0.1} | more


def test_a_row_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "circumstances", lambda: {"commit": "0"})
    monkeypatch.setattr(sys, "argv", DIGITS)
    zoo.main()
    zoo.main()
    (line,) = zoo.LOOKS.read_text().splitlines()
    found = json.loads(line)
    assert (found["network"], found["method"], found["count"], found["test_images"]) == ("digits", "float", 50, 50)
    assert (found["metric"], found["value"], found["distance"]) == ("top-1", 100.0, 0.0)
    assert "(measured before)" in capsys.readouterr().out
    assert tables([found]) == "No rows yet."  # of fewer images


def test_names_that_are_not_known() -> None:
    assert zoo.names_of(["a", "b"])("b,a") == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="'a,c' is not of a, b"):
        zoo.names_of(["a", "b"])("a,c")


def test_what_is_no_worse_than_other_tools_is_bold() -> None:
    rows = [row("float", 60.0), row("ours", 58.6), row("ort-minmax", 60.0), row("ort-entropy", 59.0), row("nncf", 50.0)]
    found = {one["method"]: one for one in rows}
    assert holds(found)  # a standard error of a thousand images at 60 % is 1.55
    assert not holds(found | {"ours": row("ours", 58.4)})
    assert not holds(found | {"ours": {"refused": "why"}})
    assert "| **58.60** | - | 60.00 minmax | 50.00 |" in tables(rows)
    pixels = "mean error, pixels (lower is better)"
    assert holds({"ours": row("ours", 0.2, pixels), "nncf": row("nncf", 0.3, pixels)})
    assert not holds({"ours": row("ours", 0.4, pixels), "nncf": row("nncf", 0.3, pixels)})


def test_speeds_are_of_the_files_that_were_measured() -> None:
    timed = {name: {"ms": 1.0, "speed": [1.0, speed, 3.0], "sha": name} for name, speed in (("ours", 2.0), ("ort-minmax", 2.1))}
    ours = row("ours", 60.0, bytes=3, float_bytes=10, sha="ours", processor_seconds=40.0, peak_mb=900)
    latency = {"network": "squeezenet", "method": "latency", "label": "", "count": None, "times": timed}
    rows = [ours, row("ort-minmax", 60.0, sha="ort-minmax"), latency]
    assert "| 0.30 | 2.00 | 2.10 | - | 1.05 | 40 | 900 | - | - |" in tables(rows, ["cost"])
    assert "| 0.30 | 2.00 | - | - | - | 40 | 900 | - | - |" in tables(
        [ours, row("ort-minmax", 60.0, sha="newer"), latency], ["cost"]
    )
