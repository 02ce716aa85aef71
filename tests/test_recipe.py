"""Recipes are read, resolved before any work is done, and every mistake in them is named."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dreamquant.errors import OptionError
from dreamquant.methods import find_method
from dreamquant.quantization.plan import CHOSEN, LayerPlan, load_plan
from dreamquant.recipe import BUDGETS, Recipe, load_recipe, recipe_names, resolve
from dreamquant.synthesis import needs_batchnorm


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("has_batchnorm", [True, False])
@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_resolve(name: str, has_batchnorm: bool, budget: str) -> None:
    recipe = load_recipe(name)
    found = resolve(recipe, has_batchnorm=has_batchnorm, budget=budget)

    assert found.name == name
    assert found.variants == []
    assert found.budget == {}
    assert found.synthesis.count >= 1
    assert found.quantization.resolved().name == found.quantization.plan
    method = find_method("synthesis", found.synthesis.method)
    assert method.check_options(found.synthesis.options) == found.synthesis.options
    if any(variant.batchnorm is False and variant.synthesis for variant in recipe.variants) and not has_batchnorm:
        assert not needs_batchnorm(method)
    assert resolve(found, has_batchnorm=has_batchnorm, budget=budget) == found  # what is written down can be run again


def test_the_default_chooses_by_bits_and_by_what_the_network_has() -> None:
    recipe = load_recipe("auto")
    reasons = set()
    for has_batchnorm in (True, False):
        for bits in ("W8A8", "W4A8", "W4A4"):
            found = resolve(recipe, has_batchnorm=has_batchnorm, bits=bits)
            method = find_method("synthesis", found.synthesis.method)
            assert has_batchnorm or not needs_batchnorm(method)
            assert (found.reconstruction.method == "nearest") == (bits == "W8A8")
            reasons.add(found.because)
    assert len(reasons) == 4
    by_setting = resolve(recipe, has_batchnorm=True, settings=["quantization.bits=W4A4"])
    assert by_setting == resolve(recipe, has_batchnorm=True, bits="W4A4")


@pytest.mark.parametrize("has_batchnorm", [True, False])
def test_for_photographs_eight_bits_take_seconds(has_batchnorm: bool) -> None:
    recipe = load_recipe("auto")
    found = resolve(recipe, has_batchnorm, photographs=True, bits="W8A8")
    assert found.synthesis.method == "fractal"
    assert found.quantization.resolved().activation_ranges == CHOSEN
    assert "photographs" in found.because
    mine = resolve(recipe, has_batchnorm, photographs=True, settings=["quantization.activation_ranges=mse"])
    assert mine.quantization.resolved().activation_ranges == "mse"
    assert resolve(recipe, has_batchnorm, photographs=True, bits="W4A4") == resolve(recipe, has_batchnorm, bits="W4A4")


def test_few_bits_for_large_photographs_are_learnt_on_few_dreams_and_many_images() -> None:
    recipe = load_recipe("auto")
    found = resolve(recipe, has_batchnorm=True, photographs=True, large=True, bits="W4A4")
    others = [
        resolve(recipe, has_batchnorm, photographs=photographs, large=large, bits=bits)
        for has_batchnorm, photographs, large, bits in product((True, False), (True, False), (True, False), ("W4A4", "W8A8"))
        if not (has_batchnorm and photographs and large and bits == "W4A4")
    ]
    assert found.synthesis.widen
    assert found.synthesis.images == 4 * found.synthesis.count
    assert not any(other.synthesis.widen for other in others)
    assert not resolve(
        recipe, has_batchnorm=True, photographs=True, large=True, bits="W4A4", settings=["synthesis.widen=false"]
    ).synthesis.widen


@pytest.mark.parametrize("given", [{"plan": "zeroq"}, {"settings": ["quantization.plan=zeroq"]}], ids=["plan", "setting"])
def test_a_variant_changes_nothing_of_another_plan(given: dict[str, Any]) -> None:
    found = resolve(load_recipe("auto"), has_batchnorm=True, photographs=True, **given)
    assert found.quantization.resolved() == load_plan("zeroq")


def test_the_first_variant_that_fits_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'summary = "mine"\nbecause = "else"\n[synthesis]\nmethod = "noise"\n'
        '[[variants]]\nbecause = "few bits"\nbits_at_most = 4\nreconstruction = { method = "qdrop", steps = 7 }\n'
        '[[variants]]\nbecause = "few or no"\nbits_at_most = 5\nbatchnorm = false\nsynthesis = { method = "fractal" }\n'
    )
    recipe = load_recipe(str(path))
    found = {
        (has_batchnorm, bits): resolve(recipe, has_batchnorm=has_batchnorm, bits=bits)
        for has_batchnorm in (True, False)
        for bits in ("W4A4", "W8A5", "W6A6")
    }
    assert found[True, "W4A4"].because == found[False, "W4A4"].because == "few bits"
    assert found[True, "W4A4"].reconstruction.options["steps"] == 7
    assert found[False, "W8A5"].because == "few or no"
    assert found[False, "W8A5"].synthesis.method == "fractal"
    assert found[True, "W8A5"].because == found[False, "W6A6"].because == "else"


def test_a_quick_budget_is_quicker() -> None:
    recipe = load_recipe("auto")
    quick, standard, paper = (resolve(recipe, has_batchnorm=True, budget=budget).synthesis for budget in BUDGETS)

    assert quick.count <= standard.count
    published = find_method("synthesis", paper.method).options["steps"].default
    assert quick.options["steps"] < standard.options["steps"] < paper.options.get("steps", published)


def test_what_is_given_goes_before_the_recipe() -> None:
    settings = [
        "synthesis.count=5",
        "synthesis.steps=7",
        "quantization.weight_ranges=mse",
        "quantization.weight_options.power=3.5",
        'quantization.activation_ranges="percentile"',
        "quantization.activation_options.percent=99",
    ]
    found = resolve(load_recipe("rsd"), has_batchnorm=True, bits="W4A6", plan="brecq", settings=settings)
    plan = found.quantization.resolved()

    assert (found.synthesis.count, found.synthesis.options["steps"]) == (5, 7)
    assert (found.quantization.bits, found.quantization.plan) == ("W4A6", "brecq")
    assert (plan.weight_ranges, plan.weight_options) == ("mse", {"power": 3.5})
    assert (plan.activation_ranges, plan.activation_options) == ("percentile", {"percent": 99})


def test_layers_have_settings_of_their_own() -> None:
    settings = [
        "quantization.layers.stem.weight_bits=8",
        "quantization.layers.stem.keep_float=true",
        "quantization.layers.a.input_bits=6",
    ]
    plan = resolve(load_recipe("rsd"), has_batchnorm=True, settings=settings).quantization.resolved()

    assert plan.layers == {"stem": LayerPlan(weight_bits=8, keep_float=True), "a": LayerPlan(input_bits=6)}
    assert plan.layer("other") == LayerPlan()


def test_another_method_keeps_the_counts_and_forgets_the_options() -> None:
    recipe = load_recipe("auto")
    found = resolve(recipe, has_batchnorm=True, settings=["synthesis.method=fractal", "synthesis.leaves=50"])

    assert found.synthesis.method == "fractal"
    assert found.synthesis.options == {"leaves": 50}
    assert found.synthesis.count == recipe.synthesis.count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("synthesis", "'synthesis' is no setting; write stage.option=value"),
        ("steps=3", "'steps=3' is no setting"),
        ("synthesis.=3", "no setting"),
        ("syntesis.steps=3", "unknown stage 'syntesis'; did you mean 'synthesis'"),
        ("synthesis.stepps=3", "'stepps'; did you mean 'steps'"),
        ("synthesis.steps=many", "rsd.steps"),
        ("synthesis.steps=2.5", "rsd.steps"),
        ("synthesis.count=0", "synthesis.count is 0; at least one image is needed"),
        ("synthesis.count=few", "synthesis.count"),
        ("synthesis.held_out=-1", "synthesis.held_out is -1"),
        ("synthesis.count.x=1", "synthesis.count"),
        ("synthesis.method=zeroqq", "unknown synthesis method 'zeroqq'; did you mean 'zeroq'"),
        ("quantization.bits=8", "bits"),
        ("quantization.bits=W8", "bits are 'W8'"),
        ("quantization.plan=3", "plan"),
        ("quantization.plan=deplyo", "unknown plan 'deplyo'; did you mean 'deploy'"),
        ("quantization.weight_range=mse", "'weight_range'; did you mean 'weight_ranges'"),
        ("quantization.weight_ranges=mze", "unknown ranges method 'mze'; did you mean 'mse'"),
        ("quantization.weight_ranges.power=3", "weight_ranges"),
        ("quantization.activation_options.power=3", "'power'"),
        ("quantization.image_bits=9", "image_bits is 9"),
        ("quantization.weight_options=3", "weight_options is 3"),
        ("quantization.transforms=['equalise']", "unknown transform method 'equalise'; did you mean 'equalize'"),
        ("quantization.weight_levels=kmens", "unknown codebooks method 'kmens'; did you mean 'kmeans'"),
        ("quantization.layers.head.weight_bits=9", "layers.head.weight_bits is 9"),
        ("quantization.layers.head.weight_bit=4", "weight_bit"),
        ("quantization.layers.head=4", "layers.head is 4"),
        ("quantization.layers=4", "layers is 4"),
        ("allocation.method=hybridd", "unknown allocation method 'hybridd'; did you mean 'hybrid'"),
        ("allocation.mode=latency", "'mode'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        resolve(load_recipe("rsd"), has_batchnorm=True, settings=[settings])
    assert "\n" not in str(caught.value)


def test_an_unknown_budget_or_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown budget 'quik'; did you mean 'quick'"):
        resolve(load_recipe("rsd"), has_batchnorm=True, budget="quik")
    with pytest.raises(OptionError, match=r"unknown recipe 'aoto'; did you mean 'auto'.*or give a \.toml file"):
        load_recipe("aoto")


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\n[synthesis]\nmethod = "noise"\n[budget.quick.synthesis]\ncount = 2\n')
    recipe = load_recipe(str(path))

    assert (recipe.name, recipe.summary) == ("mine", "mine")
    assert resolve(recipe, has_batchnorm=False, budget="quick").synthesis.count == 2
    assert recipe.quantization == Recipe.model_fields["quantization"].default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"summary = ", "is not TOML"),
        (b"\xff\xfe", "cannot be read|is not TOML"),
        (b'summary = "x"', "synthesis"),
        (b'summary = "x"\nsurprise = 1\n[synthesis]\nmethod = "noise"', "unknown option 'surprise'"),
        (b'summary = "x"\n[synthesis]\nmethod = "noise"\ncount = "few"', "count"),
        (b'summary = "x"\n[synthesis]\nmethod = "noise"\n[budget.slow.synthesis]\ncount = 1', "slow"),
        (b'summary = "x"\n[synthesis]\nmethod = "nois"', "unknown synthesis method 'nois'; did you mean 'noise'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text)
    with pytest.raises(OptionError, match=message) as caught:
        resolve(load_recipe(str(path)), has_batchnorm=True)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"absent\.toml"):
        load_recipe(str(tmp_path / "absent.toml"))
