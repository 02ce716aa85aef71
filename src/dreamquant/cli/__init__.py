"""The command line: one more caller of `run`, `synthesize`, `evaluate` and `load`."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any, NoReturn

import typer

from dreamquant.cli.arguments import limited
from dreamquant.cli.checking import check
from dreamquant.cli.making import quantize, synthesize
from dreamquant.cli.measuring import compare, dreams, evaluate
from dreamquant.cli.showing import inspect, methods, recipes
from dreamquant.errors import DreamQuantError, printable, reason

FAILED, INTERRUPTED = 2, 130
_BROKEN_PIPE = 1  # what typer and rich end with, and with nothing else, where nobody reads the standard output
LONGEST = 2000  # characters of a message: names and values of a file may be of any length

LIBRARIES = ("PIL", "asyncio", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "sympy", "torch")

app = typer.Typer(
    help="Quantize a trained neural network when its training data may not be touched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (quantize, synthesize, evaluate, dreams, inspect, compare, check):
    app.command()(limited(_command))
app.command()(recipes)
app.command()(methods)


def main() -> None:
    """Run the command line; errors that a user can cause are one line and exit status 2."""
    _silence_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        sys.exit(_run())
    except DreamQuantError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(reason(error))
    except RuntimeError as error:  # what torch makes of it
        if "can't allocate memory" not in str(error):
            raise
        _fail("there is not enough memory for what was asked for")
    except OSError as error:
        if error.errno == errno.EPIPE:
            _hang_up()
        if error.filename is not None:
            _fail(f"{os.fsdecode(error.filename)}: {reason(error)}")
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        _hang_up(f"the result cannot be written to the standard output: {error.strerror}")


def _silence_libraries() -> None:
    """What libraries note of a file that they then refuse is told in our own words; our own warnings are still heard."""
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LIBRARIES]
    for name in {*LIBRARIES, *known}:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _run() -> int:
    """The exit status; a wrong usage is told in one line, like all else that a user can cause."""
    try:
        status: Any = app(standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as end:
        if end.code != _BROKEN_PIPE:
            raise
        _hang_up()
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage have no public base
            raise
        if sys.argv[1:]:
            _fail(f"{error.format_message().rstrip('.')}; see {_command_of(error)} --help")
        status = FAILED  # the help has been shown
    if status == INTERRUPTED:
        print("dreamquant: interrupted; nothing was written", file=sys.stderr)  # noqa: T201
    return status if isinstance(status, int) else 0


def _command_of(error: Any) -> str:
    name = getattr(error.ctx, "info_name", None) if getattr(error, "ctx", None) is not None and error.ctx.parent else None
    return f"dreamquant {name}" if name else "dreamquant"


def _hang_up(message: str = "") -> NoReturn:
    """End with nothing more written to a standard output that takes nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if message:
        _fail(message)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    text = printable(message)
    print(f"dreamquant: {text if len(text) <= LONGEST else text[:LONGEST] + '...'}", file=sys.stderr)  # noqa: T201
    sys.exit(FAILED)
