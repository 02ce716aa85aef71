"""Hostile input in short; DREAMQUANT_FUZZ gives other options, as in DREAMQUANT_FUZZ="--count 1000 --seed 3"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = "--count 120 --seed 17 --seconds 45"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory a case takes is read from /proc")
def test_no_input_does_worse_than_one_line() -> None:
    options = os.environ.get("DREAMQUANT_FUZZ", SHORT).split()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *options]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-2000:]
    assert "cases of seed" in finished.stdout
