"""Recipes: a published system, or a default of ours, as a composition of methods. A recipe is a TOML file in `recipes/`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamquant import shelf
from dreamquant.errors import OptionError, unknown
from dreamquant.methods import BUDGETS, convert, find_method
from dreamquant.quantization.plan import CHOSEN, Plan, check_bits, forbidden, load_plan, load_target, parse_bits
from dreamquant.synthesis import WIDENED

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
    widen: bool = False  # to four times `count`, by mirror images and scenes

    @classmethod
    def own(cls) -> dict[str, Any]:
        """The fields that are no options of the method, with their defaults: they stay when another method is asked for."""
        return {name: field.default for name, field in cls.model_fields.items() if name not in Stage.model_fields}

    @property
    def images(self) -> int:
        """How many images there are to calibrate on."""
        return WIDENED * self.count if self.widen else self.count


class Allocation(Stage):
    """How layers come by bits and granularity of their own."""

    method: str = "uniform"


class Reconstruction(Stage):
    """How weights are rounded and steps chosen, once every tensor has its grid."""

    method: str = "nearest"


class Training(Stage):
    """How the quantized network is trained, its float self being the teacher."""


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


class Variant(BaseModel):
    """Stages that take the place of a recipe's, where the network and the bits are as said; what is left out fits all.

    `quantization` changes fields of the recipe's own plan; another plan, asked for by name, is a protocol and stays as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    because: str
    batchnorm: bool | None = None  # whether the network has BatchNorm statistics
    photographs: bool | None = None  # whether the network takes three channels of a known normalisation
    large: bool | None = None  # whether its images have 96 x 96 pixels or more
    classes: bool | None = None  # whether an output is scores of classes, which a dreamer can aim at
    bits_at_most: int | None = None  # of weights or of activations, whichever are fewer
    synthesis: Synthesis | None = None
    allocation: Allocation | None = None
    quantization: dict[str, Any] = Field(default_factory=dict)
    reconstruction: Reconstruction | None = None

    def fits(self, bits: int, has_batchnorm: bool, photographs: bool, large: bool, classes: bool) -> bool:
        """Whether this variant is for such a network and so many bits."""
        asked = (
            (self.batchnorm, has_batchnorm),
            (self.photographs, photographs),
            (self.large, large),
            (self.classes, classes),
        )
        return all(wanted in (None, is_so) for wanted, is_so in asked) and (
            self.bits_at_most is None or bits <= self.bits_at_most
        )


class Recipe(BaseModel):
    """A recipe file. The first of the `variants` that fits counts; `because` says why what is run is run.

    `budget` holds, for each budget, options that replace those of the stages; `published` the paper's own figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    paper: str = ""
    protocol: str = ""
    because: str = ""
    left_out: list[str] | None = None  # of the plan's fields, what the target does not let the recipe change
    published: list[dict[str, Any]] = Field(default_factory=list)
    synthesis: Synthesis
    allocation: Allocation = Allocation()
    quantization: Quantization = Quantization()
    reconstruction: Reconstruction = Reconstruction()
    training: Training | None = None
    variants: list[Variant] = Field(default_factory=list)
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
    has_batchnorm: bool,
    photographs: bool = False,
    large: bool = False,
    classes: bool = True,
    *,
    budget: str = "standard",
    bits: str | None = None,
    plan: str | None = None,
    target: str | None = None,
    settings: Iterable[str] = (),
) -> Recipe:
    """The recipe as it will be run: the variant that fits, the budget's and the user's settings applied, every option known.

    `has_batchnorm`, `photographs` (`Network.sees_photographs`), `large` and `classes` say what network it is for, as the
    fields of `Variant` do. `target` names the plan of a target: it takes the place of the recipe's own, gives the bits where
    none are asked for, and is changed as the recipe changes its own, but for what the target asks for. `settings` are
    `stage.option=value`, with the stages `synthesis`, `allocation`, `quantization`, `reconstruction` and `training`. Raises
    `OptionError` for whatever is not known or impossible, before any work is done.
    """
    if budget not in BUDGETS:
        raise OptionError(unknown("budget", budget, BUDGETS))
    if plan is not None and target is not None:
        raise OptionError(f"the plan is {plan} and the target {target}: a target is a plan, name one of them")
    settings = list(settings)
    quantization = recipe.quantization.model_dump()
    own = recipe.quantization.plan
    if target is not None:
        asked = load_target(target)
        own = plan = target
        bits = bits or (asked.target.bits if asked.target is not None else None)
    quantization.update({name: value for name, value in (("bits", bits), ("plan", plan)) if value is not None})
    named = ("quantization.bits=", "quantization.plan=")  # these decide on the variant; all others change what it says
    _apply([setting for setting in settings if setting.startswith(named)], {"quantization": quantization})
    width = parse_bits(str(quantization["bits"]))
    fewest = min(width.weights, width.activations)
    facts = has_batchnorm, photographs, large, classes
    variant = next((one for one in recipe.variants if one.fits(fewest, *facts)), None)
    if variant and quantization["plan"] == own:
        quantization.update(variant.quantization)
    left_out = [] if target is None else forbidden(load_plan(target), quantization)
    for name in left_out:
        del quantization[name]
    stages = {
        "synthesis": ((variant and variant.synthesis) or recipe.synthesis).model_dump(),
        "allocation": ((variant and variant.allocation) or recipe.allocation).model_dump(),
        "quantization": quantization,
        "reconstruction": ((variant and variant.reconstruction) or recipe.reconstruction).model_dump(),
        "training": {} if recipe.training is None else recipe.training.model_dump(),
    }
    for stage, fields in stages.items():
        fields.update(recipe.budget.get(budget, {}).get(stage, {}))  # type: ignore[call-overload]
    _apply(settings, stages)
    training = stages["training"]
    if training and "method" not in training:
        raise OptionError(f"training.{next(iter(training))} is set for no method: set training.method too")
    try:
        resolved = Recipe(
            **recipe.model_dump(exclude={*stages, "variants", "because", "budget", "left_out"}),
            because=variant.because if variant else recipe.because,
            left_out=left_out or None,
            synthesis=Synthesis(**_checked("synthesis", stages["synthesis"], budget, **_counts(stages["synthesis"]))),
            allocation=Allocation(**_checked("allocation", stages["allocation"], budget)),
            quantization=Quantization(**stages["quantization"]),
            reconstruction=Reconstruction(**_checked("reconstruction", stages["reconstruction"], budget)),
            training=Training(**_checked("training", training, budget)) if training else None,
        )
    except ValidationError as error:
        raise shelf.complaint(f"recipe {recipe.name}", error, Recipe.model_fields) from None
    whole = resolved.quantization.resolved()
    check_bits(whole, parse_bits(resolved.quantization.bits))
    _check_methods(whole)
    _check_learning(resolved, whole)
    return resolved


def _check_learning(recipe: Recipe, plan: Plan) -> None:
    """`OptionError` where what is learnt would leave the grids that a target asks for."""
    if plan.target is not None and recipe.training is not None:
        raise OptionError(f"{recipe.training.method} trains grids, which {plan.name} asks to be as they are: take another recipe")
    if plan.scales == "power_of_two" and recipe.reconstruction.method != "nearest":
        method = recipe.reconstruction.method
        raise OptionError(f"{method} learns scales, which are powers of two in {plan.name}: set reconstruction.method=nearest")


def _apply(settings: Iterable[str], stages: dict[str, dict[str, Any]]) -> None:
    for setting in settings:
        place, separator, value = setting.partition("=")
        stage, _, option = place.partition(".")
        if not separator or not option:
            raise OptionError(f"{setting!r} is no setting; write stage.option=value, as in synthesis.steps=200")
        if stage not in stages:
            raise OptionError(unknown("stage", stage, stages) + f" in {setting!r}")
        if option == "method" and value != stages[stage].get("method"):
            kept = {name: value for name, value in stages[stage].items() if name in Synthesis.own()}
            stages[stage].clear()  # another method's options mean nothing to this one
            stages[stage].update(kept)
        table, (*outer, last) = stages[stage], option.split(".")
        for name in outer:
            inner = table.get(name, {})
            if not isinstance(inner, dict):
                raise OptionError(f"{stage}.{name} is {inner!r}, no table that {setting!r} could set a part of")
            table[name] = dict(inner)
            table = table[name]
        table[last] = _literal(value)


def _literal(text: str) -> object:
    """A setting's text as the TOML value it spells, else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, or more of it than it reads: then it is no value of an option either
        return text


def _checked(family: str, fields: dict[str, Any], budget: str, **others: Any) -> dict[str, Any]:
    """A stage's method and its options: the budget's, and over them those given, all of them known. `others` are no options."""
    method = find_method(family, str(fields["method"]))
    options = {name: value for name, value in fields.items() if name not in ("method", *others)}
    return {"method": method.name, **others, **method.budget(budget), **method.check_options(options)}


def _counts(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: convert(f"synthesis.{name}", fields[name], default) for name, default in Synthesis.own().items()
    }
    for name in ("count", "held_out"):
        if found[name] < 1:
            raise OptionError(f"synthesis.{name} is {found[name]}; at least one image is needed")
    return found


def _check_methods(plan: Plan) -> None:
    for name in plan.transforms:
        find_method("transform", name).check_options(plan.transform_options.get(name, {}))
    if plan.weight_levels != "uniform":
        find_method("codebooks", plan.weight_levels).check_options(plan.level_options)
    if plan.activation_ranges == CHOSEN and plan.activation_options:
        raise OptionError(f"activation_options are set, and activation_ranges are {CHOSEN!r}, which have none: name ranges too")
    activations = [] if plan.activation_ranges == CHOSEN else [(plan.activation_ranges, plan.activation_options)]
    for name, options in [(plan.weight_ranges, plan.weight_options), *activations]:
        find_method("ranges", name).check_options(options)
