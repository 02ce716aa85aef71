"""The command that holds a file to a target's rules: `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dreamquant.cli.arguments import Json
from dreamquant.conformity import check as check_file
from dreamquant.terminal import print_conformity, print_json

BROKEN = 1


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="a quantized ONNX file of any tool")],
    target: Annotated[str, typer.Option(help="a target's name (see docs/targets.md) or a plan's .toml file")],
    as_json: Json = False,
) -> None:
    """List, rule by rule, what a target would refuse in FILE or run in float. Exit status: 0 where it conforms, 1 where it does
    not, 2 where the file or the target cannot be read."""
    found = check_file(file, target)
    if as_json:
        print_json(found.summary())
    else:
        print_conformity(found, file)
    if not found.conforms:
        raise typer.Exit(BROKEN)
