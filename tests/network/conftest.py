"""Networks are read here each time anew."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> None:
    """In place of the fixture that reads the trained example once."""
