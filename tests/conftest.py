"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real networks and images: DREAMQUANT_DATA, or beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("DREAMQUANT_DATA", default))
    if not folder.is_dir():
        pytest.skip("needs real networks: set DREAMQUANT_DATA to their folder")
    return folder
