"""Recipes: a published system, or a default of ours, as a composition of methods. A recipe is a TOML file in `recipes/`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamquant import shelf
from dreamquant.errors import OptionError, unknown
from dreamquant.methods import BUDGETS, convert, find_method
from dreamquant.quantization.plan import Plan, load_plan, parse_bits

Budget = Literal["quick", "standard", "paper"]
RECIPES = ("dreamquant", "recipes")


class Stage(BaseModel):
    """A method by name, and its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    method: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Synthesis(Stage):
    """How calibration images are made, and how many."""

    count: int = 64
    held_out: int = 16  # made apart, to measure on


class Quantization(BaseModel):
    """A plan by name, bits, and fields of the plan that are changed."""

    model_config = ConfigDict(frozen=True, extra="allow")
    plan: str = "deploy"
    bits: str = "W8A8"

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def resolved(self) -> Plan:
        """The plan with its changes."""
        return load_plan(self.plan, **self.changes)


class Recipe(BaseModel):
    """A recipe file. `budget` holds, for each budget, options that replace those above; `published` the paper's own figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    paper: str = ""
    protocol: str = ""
    published: list[dict[str, Any]] = Field(default_factory=list)
    synthesis: Synthesis
    synthesis_without_batchnorm: Synthesis | None = None  # for networks that have none
    quantization: Quantization = Quantization()
    budget: dict[Budget, dict[str, dict[str, Any]]] = Field(default_factory=dict)


def recipe_names() -> list[str]:
    """The names of the recipes that ship with the package."""
    return shelf.names(*RECIPES)


def load_recipe(name: str) -> Recipe:
    """A recipe by its name or from a TOML file; `OptionError` names what is not known."""
    fields = shelf.read("recipe", name, *RECIPES)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise shelf.complaint(f"recipe {name}", error, Recipe.model_fields) from None


def resolve(
    recipe: Recipe,
    *,
    has_batchnorm: bool,
    budget: str = "standard",
    bits: str | None = None,
    plan: str | None = None,
    settings: Iterable[str] = (),
) -> Recipe:
    """The recipe as it will be run: one synthesis stage, the budget's and the user's settings applied, every option known.

    `settings` are `stage.option=value`, stages `synthesis` and `quantization`. Raises `OptionError` for whatever is not known or
    impossible, before any work is done.
    """
    if budget not in BUDGETS:
        raise OptionError(unknown("budget", budget, BUDGETS))
    chosen = recipe.synthesis
    if not has_batchnorm and recipe.synthesis_without_batchnorm is not None:
        chosen = recipe.synthesis_without_batchnorm
    synthesis, quantization = chosen.model_dump(), recipe.quantization.model_dump()
    changed = {stage: dict(options) for stage, options in recipe.budget.get(budget, {}).items()}  # type: ignore[call-overload]
    synthesis.update(
        changed.pop("synthesis", {}) if chosen is recipe.synthesis else changed.pop("synthesis_without_batchnorm", {})
    )
    quantization.update(changed.pop("quantization", {}))
    if bits is not None:
        quantization["bits"] = bits
    if plan is not None:
        quantization["plan"] = plan
    _apply(settings, synthesis, quantization)
    synthesis = _checked_synthesis(synthesis, budget)
    try:
        resolved = Recipe(
            **recipe.model_dump(exclude={"synthesis", "synthesis_without_batchnorm", "quantization", "budget"}),
            synthesis=Synthesis(**synthesis),
            quantization=Quantization(**quantization),
        )
    except ValidationError as error:
        raise shelf.complaint(f"recipe {recipe.name}", error, Recipe.model_fields) from None
    parse_bits(resolved.quantization.bits)
    _check_ranges(resolved.quantization.resolved())
    return resolved


def _apply(settings: Iterable[str], synthesis: dict[str, Any], quantization: dict[str, Any]) -> None:
    stages = {"synthesis": synthesis, "quantization": quantization}
    for setting in settings:
        place, separator, value = setting.partition("=")
        stage, _, option = place.partition(".")
        if not separator or not option:
            raise OptionError(f"{setting!r} is no setting; write stage.option=value, as in synthesis.steps=200")
        if stage not in stages:
            raise OptionError(unknown("stage", stage, stages) + f" in {setting!r}")
        if stage == "synthesis" and option == "method" and value != synthesis["method"]:
            kept = {name: synthesis[name] for name in ("count", "held_out")}
            synthesis.clear()  # another method's options mean nothing to this one
            synthesis.update(kept)
        name, _, inner = option.partition(".")
        if inner:
            table = stages[stage].get(name, {})
            if not isinstance(table, dict):
                raise OptionError(f"{stage}.{name} is {table!r}, no table that {setting!r} could set a part of")
            stages[stage][name] = {**table, inner: _literal(value)}
        else:
            stages[stage][option] = _literal(value)


def _literal(text: str) -> object:
    """A setting's text as the TOML value it spells, else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked_synthesis(fields: dict[str, Any], budget: str) -> dict[str, Any]:
    method = find_method("synthesis", str(fields["method"]))
    options = {name: value for name, value in fields.items() if name not in Synthesis.model_fields}
    numbers = {name: convert(f"synthesis.{name}", fields[name], 1) for name in ("count", "held_out")}
    for name, number in numbers.items():
        if number < 1:  # type: ignore[operator]
            raise OptionError(f"synthesis.{name} is {number}; at least one image is needed")
    return {"method": method.name, **numbers, **method.budget(budget), **method.check_options(options)}


def _check_ranges(plan: Plan) -> None:
    for name, options in ((plan.weight_ranges, plan.weight_options), (plan.activation_ranges, plan.activation_options)):
        find_method("ranges", name).check_options(options)
