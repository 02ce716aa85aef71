"""TOML files that ship with the package, or that a user names: recipes and plans."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dreamquant.errors import OptionError, blamed, unknown


def names(package: str, folder: str) -> list[str]:
    """The names of the TOML files in a package's folder."""
    entries = files(package).joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml"))


def read(what: str, name: str, package: str, folder: str) -> dict[str, Any]:
    """The fields of a shipped file by its name, or of a `.toml` file by its path; `name` is filled in from it.

    Raises `OptionError` for a name that is not known and for a file that cannot be read or is not TOML.
    """
    if name.endswith(".toml"):
        with blamed(OptionError, f"the {what} {name} cannot be read"):
            text = Path(name).read_text(encoding="utf-8")
    elif name in names(package, folder):
        text = files(package).joinpath(folder, f"{name}.toml").read_text()
    else:
        raise OptionError(unknown(what, name, names(package, folder)) + "; or give a .toml file")
    with blamed(OptionError, f"the {what} {name} is not TOML"):
        return {"name": Path(name).stem, **tomllib.loads(text)}


def complaint(what: str, error: ValidationError, known: Any) -> OptionError:
    """One sentence for pydantic's first complaint about a file's fields."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return OptionError(f"{what}: " + unknown("option", field, known))
    if first["type"] == "missing":
        return OptionError(f"{what}: {field} is missing")
    return OptionError(f"{what}: {field} is {first['input']!r}: {first['msg']}")
