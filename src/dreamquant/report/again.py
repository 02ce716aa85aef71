"""How to make the same file again: the command, and the recipe as it was run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dreamquant.flow import Result
from dreamquant.network.graph import Network
from dreamquant.network.input_space import NO_PIXELS, format_numbers
from dreamquant.network.outputs import STATED
from dreamquant.recipe import Recipe

SAVED = "recipe.toml"
AS_WRITTEN = "paper"  # the budget that adds nothing to what a recipe says


def recipe_toml(recipe: Recipe) -> str:
    """A resolved recipe as a file that `--recipe` takes."""
    fields = recipe.model_dump(exclude_none=True, exclude={"published", "variants", "budget"})
    tables = {name: value for name, value in fields.items() if isinstance(value, Mapping)}
    lines = [f"{name} = {_toml(value)}" for name, value in fields.items() if name not in tables and value != ""]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def command_again(result: Result) -> str:
    """The command, or the Python where a module was given, that runs the recipe of `recipe_toml` once more."""
    network, output = result.network, str(result.artifact.path)
    if network.source.kind == "module" and ":" not in network.source.text:
        return _python(network, output, result.seed)
    parts = ["dreamquant", "quantize", network.source.text, "-o", output, "--recipe", SAVED, "--budget", AS_WRITTEN]
    parts += ["--seed", str(result.seed), "--input-shape", ",".join(map(str, network.input_shape))]
    parts += [
        f"--{name}={value if isinstance(value, str) else format_numbers(value)}" for name, value in stated_input(network).items()
    ]
    parts += [f"--outputs={name}={kind}" for name, kind in _stated_outputs(network).items()]
    parts += ["--force"] * bool(network.space.doubt) + ["--trust-model"] * network.source.trusted
    return on_lines(parts)


def stated_input(network: Network) -> dict[str, str | tuple[float, ...]]:
    """What a user has stated of the input space, by the names of the options."""
    space = network.space
    if space.known != "stated":
        return {}
    return {"mean": space.mean, "std": space.std} if space.mean else {"pixels": NO_PIXELS}


def on_lines(parts: Sequence[str]) -> str:
    """A command as a shell takes it, each option on a line of its own."""
    lines: list[list[str]] = [[]]
    for part in parts:
        if part.startswith("-") and part != "-":
            lines.append([])
        lines[-1].append(shlex.quote(part))
    return " \\\n    ".join(" ".join(line) for line in lines)


def _python(network: Network, output: str, seed: int) -> str:
    fields: dict[str, Any] = {"recipe": SAVED, "budget": AS_WRITTEN, "seed": seed, "input_shape": network.input_shape}
    fields |= stated_input(network)
    if _stated_outputs(network):
        fields["outputs"] = _stated_outputs(network)
    if network.space.doubt:
        fields["force"] = True
    options = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"dreamquant.run(model, {output!r}, {options})"


def _stated_outputs(network: Network) -> dict[str, str]:
    """The kinds of outputs that were stated."""
    return {output.name: output.kind for output in network.outputs if output.known == STATED}


def _key(name: str) -> str:
    return name if name and all(one.isascii() and (one.isalnum() or one in "_-") for one in name) else _toml(name)


def _toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(str(key))} = {_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    raise TypeError(f"a recipe holds {value!r}, which TOML has no form for")
