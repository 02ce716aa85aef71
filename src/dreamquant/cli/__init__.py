"""The command line: one more caller of `run`, `synthesize`, `evaluate` and `load`."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from dreamquant.cli.making import quantize, synthesize
from dreamquant.cli.measuring import compare, dreams, evaluate
from dreamquant.cli.showing import inspect, methods, recipes
from dreamquant.errors import DreamQuantError

FAILED, INTERRUPTED = 2, 130

app = typer.Typer(
    help="Quantize a trained neural network when its training data may not be touched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (quantize, synthesize, evaluate, dreams, inspect, compare, recipes, methods):
    app.command()(_command)


def main() -> None:
    """Run the command line; errors that a user can cause are one line and exit status 2."""
    try:
        app()
    except DreamQuantError as error:
        _fail(str(error))
    except SystemExit as end:  # typer makes one of a Ctrl-C, without a word
        if end.code == INTERRUPTED:
            print("dreamquant: interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        raise


def _fail(message: str) -> NoReturn:
    print(f"dreamquant: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(FAILED)
