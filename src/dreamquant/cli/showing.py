"""The commands that show what there is: `inspect`, `recipes` and `methods`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dreamquant.assess.inspection import inspect as inspect_network
from dreamquant.cli.arguments import (
    Channels,
    Device,
    Force,
    Json,
    Layout,
    Mean,
    Model,
    Outputs,
    Pixels,
    Quiet,
    Seed,
    Shape,
    Std,
    Trust,
    input_options,
)
from dreamquant.devices import AUTO
from dreamquant.flow import ranked
from dreamquant.methods import FAMILIES, method_names
from dreamquant.network.load import load
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.recipe import load_recipe, recipe_names
from dreamquant.terminal import print_inspection, print_json, print_methods, print_recipes, progress_bars


def inspect(
    model: Model,
    input_shape: Shape = None,
    plan: Annotated[str, typer.Option(help="the plan whose sites are shown")] = "deploy",
    bits: Annotated[str, typer.Option(help="the bits whose sites are shown")] = "W8A8",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="rank layers by the damage that each alone does on images the network dreams")
    ] = False,
    recipe: Annotated[str, typer.Option(help="the recipe that dreams them")] = "auto",
    mean: Mean = None,
    std: Std = None,
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    force: Force = False,
    trust_model: Trust = False,
    outputs: Outputs = None,
    seed: Seed = 0,
    device: Device = AUTO,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show MODEL's layers, BatchNorms, segments, what a plan quantizes, which methods can work on it and which layers hurt."""
    chosen, width, dreamer = load_plan(plan), parse_bits(bits), load_recipe(recipe)
    given = input_options(input_shape, mean, std, pixels, layout, channels, outputs)
    network = load(model, **given, force=force, trust=trust_model, device=device)
    found = inspect_network(network, chosen, width)
    if sensitivity:
        with progress_bars(quiet or as_json) as progress:
            found = replace(found, sensitivity=ranked(network, dreamer, chosen, width, seed, progress))
    if as_json:
        print_json(found.summary())
    else:
        print_inspection(found)


def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    found = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print_json([recipe.model_dump(exclude_none=True) for recipe in found])
    else:
        print_recipes(found)


def methods(as_json: Json = False) -> None:
    """List the methods of every family, with their options."""
    if as_json:
        print_json({family: method_names(family) for family in FAMILIES})
    else:
        print_methods()
