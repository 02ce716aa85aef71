"""Names of methods -> modules. Nothing is listed by hand: a method is a file in its family's folder.

A method file `family/name.py` defines a function `name`; its keyword-only arguments are its options, its docstring's first
line says what it does, and `PAPER` names where it comes from.
"""

from __future__ import annotations

import inspect
import operator
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, SupportsIndex

from dreamquant.errors import OptionError, unknown
from dreamquant.limits import LARGEST_COUNT

SEEDS = 2**63  # so many: 0 is the first
BUDGETS = ("quick", "standard", "paper")
FAMILIES = {
    "synthesis": "dreamquant.synthesis",
    "transform": "dreamquant.transform",
    "ranges": "dreamquant.quantization.ranges",
    "codebooks": "dreamquant.quantization.codebooks",
    "allocation": "dreamquant.allocation",
    "reconstruction": "dreamquant.reconstruction",
    "training": "dreamquant.training",
}

# arguments that the flow gives, not the user
_GIVEN = {"seed", "callback", "folder", "bits", "symmetric"}


@dataclass(frozen=True)
class Method:
    """One published way of doing a stage's work."""

    family: str
    name: str
    function: Callable[..., Any]
    module: ModuleType

    @property
    def paper(self) -> str:
        return str(self.module.PAPER)

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The method's options: its keyword-only arguments, less those that the flow gives."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _GIVEN
        }

    def budget(self, name: str) -> dict[str, Any]:
        """The options that a budget replaces: `BUDGETS` of the method's file; none for `paper`, which runs what was published."""
        return dict(getattr(self.module, "BUDGETS", {}).get(name, {}))

    def check_options(self, options: Mapping[str, object]) -> dict[str, Any]:
        """The options, text turned into the type of each argument's default; `OptionError` for one that is not known."""
        return {name: self._convert(name, value) for name, value in options.items()}

    def _convert(self, name: str, value: object) -> object:
        if name not in self.options:
            raise OptionError(unknown(f"option of {self.family} method {self.name!r}:", name, self.options))
        default = self.options[name].default
        return convert(f"{self.name}.{name}", value, default)


def convert(name: str, value: object, default: object) -> object:
    """`value` (from a command line or a recipe) as the type of `default`; `OptionError` if it does not fit."""
    try:
        if isinstance(default, bool):
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if isinstance(default, int):
            if isinstance(value, float):
                raise ValueError
            return checked_count(name, int(value))  # type: ignore[call-overload]
        if isinstance(default, float):
            return float(value)  # type: ignore[arg-type]
        if isinstance(default, str):
            if not isinstance(value, str):
                raise ValueError
            return value
    except (KeyError, ValueError, TypeError, OverflowError):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(default)]
        raise OptionError(f"{name} is {value!r}; it must be {kind} (default {default!r})") from None
    return value


def checked_count(name: str, value: SupportsIndex) -> int:
    """The number of what is made or done; `OptionError` for no whole number, and one that no run comes to the end of."""
    try:
        number = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} is {value!r}; it must be a whole number") from None
    if number > LARGEST_COUNT:
        raise OptionError(f"{name} is {number:.6g}; it must be at most {LARGEST_COUNT:,}")
    return number


def method_names(family: str) -> list[str]:
    """The names of a family's methods: its folder's files."""
    package = import_module(FAMILIES[family])
    return sorted(
        info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_") and not info.ispkg
    )


def find_method(family: str, name: str) -> Method:
    """The method of a family by its name; `OptionError` names the known ones."""
    names = method_names(family)
    if name not in names:
        raise OptionError(unknown(f"{family} method", name, names))
    module = import_module(f"{FAMILIES[family]}.{name}")
    return Method(family, name, getattr(module, name), module)


def check_seed(seed: SupportsIndex) -> int:
    """A seed as a plain number; `OptionError` for what is no whole number, or one that not every generator takes."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number < SEEDS:
        raise OptionError(f"seed is {seed!r}; it must be a whole number from 0 to {SEEDS - 1}")
    return number
