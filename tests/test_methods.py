"""Methods are found by their files, their options by their signatures, and text becomes what an option is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dreamquant.errors import OptionError
from dreamquant.methods import FAMILIES, convert, find_method, method_names

ALL = [(family, name) for family in FAMILIES for name in method_names(family)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_names_are_the_files_of_the_folder(family: str) -> None:
    package = import_module(FAMILIES[family])
    assert package.__file__ is not None
    files = sorted(path.stem for path in Path(package.__file__).parent.glob("*.py") if not path.stem.startswith("_"))

    assert method_names(family) == files
    assert len(files) > 1


@pytest.mark.parametrize(("family", "name"), ALL, ids=lambda value: value)
def test_a_method_is_a_function_of_its_files_name(family: str, name: str) -> None:
    method = find_method(family, name)

    assert method.function.__name__ == name
    assert method.function.__module__ == f"{FAMILIES[family]}.{name}"
    assert method.summary
    assert "\n" not in method.summary
    assert len(method.paper) > 10
    assert "seed" not in method.options
    assert "bits" not in method.options
    for option, parameter in method.options.items():  # each has a default, and its text is the default again
        assert method.check_options({option: str(parameter.default)}) == {option: parameter.default}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_unknown_names_are_answered_with_all_known_ones(family: str) -> None:
    with pytest.raises(OptionError, match=f"unknown {family} method 'nothing'") as caught:
        find_method(family, "nothing")
    assert all(name in str(caught.value) for name in method_names(family))


def test_unknown_options_are_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="'powre'; did you mean 'power'"):
        find_method("ranges", "mse").check_options({"powre": 2})


@pytest.mark.parametrize(
    ("value", "default", "wanted"),
    [
        ("3", 1, 3),
        (3, 1, 3),
        ("0.5", 1.0, 0.5),
        (2, 1.0, 2.0),
        ("1e-3", 1.0, 0.001),
        ("true", False, True),
        ("0", True, False),
        ("False", True, False),
        (True, False, True),
        ("text", "a", "text"),
    ],
)
def test_text_becomes_what_the_default_is(value: object, default: object, wanted: object) -> None:
    found = convert("x", value, default)

    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("value", "default"),
    [("x", 1), (0.5, 1), ("1.5", 1), (None, 1), ("x", 1.0), ([1], 1.0), ("maybe", True), ([], True), (3, "text"), ({}, 1)],
)
def test_what_does_not_fit_is_named(value: Any, default: object) -> None:
    with pytest.raises(OptionError, match=r"family\.option") as caught:
        convert("family.option", value, default)
    assert "\n" not in str(caught.value)
