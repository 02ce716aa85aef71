"""The documents say what the code does."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import dreamquant.synthesis
from dreamquant.cli import app
from dreamquant.conformity import RULES
from dreamquant.methods import FAMILIES, find_method, method_names
from dreamquant.network.graph import Network
from dreamquant.quantization.plan import WIDTHS, load_plan, plan_names, target_names
from dreamquant.recipe import load_recipe, recipe_names
from dreamquant.synthesis import needs_batchnorm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TARGETS = (ROOT / "docs" / "targets.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/digits/README.md", *(ROOT / "docs").rglob("*.md"))
DOCUMENTS = sorted(str(page.relative_to(ROOT)) for page in PAGES)


def rows(heading: str) -> dict[str, list[str]]:
    """A table of docs/methods.md: the name in its first column -> the other cells."""
    section = METHODS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {first.strip("`"): rest for first, *rest in cells[2:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_has_its_line(family: str) -> None:
    assert list(rows(family)) == method_names(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_lines_say_what_methods_do(family: str) -> None:
    for name, (_, batchnorm, options, paper) in rows(family).items():
        method = find_method(family, name)
        assert batchnorm == ("yes" if family == "synthesis" and needs_batchnorm(method) else "no")
        told = dict(re.findall(r"`(\w+)=([^`]*)`", options))
        assert told == {key: str(method.options[key].default) for key in told}
        assert bool(told) == bool(method.options)
        assert re.split("[ ,]", paper)[0] in method.paper


def test_every_recipe_and_plan_has_its_line() -> None:
    assert list(rows("recipes")) == recipe_names()
    assert list(rows("plans")) == [name for name in plan_names() if name not in target_names()]
    for name, (text, _) in rows("recipes").items():
        recipe = load_recipe(name)
        assert f"plan `{recipe.quantization.plan}`" in text
    assert all(load_plan(name).summary for name in plan_names())


def target_row(name: str) -> list[str]:
    """What docs/targets.md says of a target, column by column, read off its plan."""
    plan = load_plan(name)
    target = plan.target
    assert target is not None
    sign = "int" if plan.activation_sign == "signed" or plan.activation_zero_point == "none" else "uint"
    widths = (
        "any" if list(target.activation_bits) == list(WIDTHS) else " or ".join(f"{sign}{bits}" for bits in target.activation_bits)
    )
    activations = [f"{sign}8" if widths == "any" else widths, f"zero point {plan.activation_zero_point}"]
    activations += [f"range {plan.minimum_range:.4g} or more"] if plan.minimum_range else []
    weights = ["any" if list(target.weight_bits) == list(WIDTHS) else " or ".join(f"int{bits}" for bits in target.weight_bits)]
    weights += ["narrow"] if plan.weight_narrow else []
    weights += [f"per tensor: {', '.join(plan.per_tensor)}"] if plan.per_tensor else ["per channel"]
    weights += ["no overflow in 16 bits"] if plan.saturation_free else []
    more = ["scales 2^n"] if plan.scales == "power_of_two" else []
    more += [f"{one.operator} 1/{one.steps:g}, {one.zero_point}" for one in plan.fixed]
    more += [f"float below {plan.float_below_channels} channels"] if plan.float_below_channels else []
    more += ["shapes fixed"] if target.static_shapes else []
    placement = {"integer": "between integer layers", "inputs": "inputs alone", "every_tensor": "every tensor"}[plan.placement]
    shared = ", ".join(plan.ties)
    return [target.runtime, "; ".join(activations), "; ".join(weights), plan.bias, placement, shared, "; ".join(more) or "-"]


def test_every_target_has_its_line() -> None:
    lines = [
        line for line in TARGETS.partition("\n## The rules\n")[2].partition("\n## ")[0].splitlines() if line.startswith("| `")
    ]
    told = {first.strip(" `"): [cell.strip() for cell in rest] for first, *rest in (line.strip("|").split("|") for line in lines)}
    assert told == {name: target_row(name) for name in target_names()}
    assert all(f"`{rule}`" in TARGETS for rule in RULES)
    sources = {plan.target.source for plan in map(load_plan, target_names()) if plan.target is not None}
    assert all(source in TARGETS for source in sources)


def commands(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("    dreamquant ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_of_the_readme_exist() -> None:
    group = typer.main.get_command(app)
    found = commands(README)
    assert len(found) > 5
    for _, name, *arguments in found:
        command = group.commands[name]  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {argument for argument in arguments if re.match("--?[a-z]", argument)} <= options
        assert "-o" in arguments or "-o" not in options
    assert set(group.commands) - {"recipes"} == {name for _, name, *_ in found}  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_targets_of_make_exist(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    place = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", place.read_text()):
        assert target.startswith("https://") or (place.parent / target).exists(), target


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "dreams.png").stat().st_size < 100_000


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Path) -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copy(digits / "digits_bnfolded.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    exec(shown, {})
    assert (tmp_path / "model.int8.onnx").exists()
    assert (tmp_path / "model.html").exists()


def test_the_worked_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residual: Network) -> None:
    """The method of CONTRIBUTING.md, put into its folder, is found and passes the test that is shown with it."""
    method, test = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    (tmp_path / "stripes.py").write_text(method)
    monkeypatch.setattr(dreamquant.synthesis, "__path__", [*dreamquant.synthesis.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "dreamquant.synthesis.stripes", None)
    del sys.modules["dreamquant.synthesis.stripes"]  # so that it is gone again after the test
    assert "stripes" in method_names("synthesis")
    shown: dict[str, Any] = {}
    exec(test, shown)
    shown["test_columns_are_constant"](residual)
