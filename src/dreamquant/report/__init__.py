"""The report: a result as one page that needs nothing but itself, for whoever has to decide about the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dreamquant.errors import OptionError, OutputError
from dreamquant.files import atomic_write, check_output
from dreamquant.flow import Progress, Result
from dreamquant.report.facts import Facts, file_name, gather

TEMPLATE, STYLE, SCRIPT = "report.html.j2", "report.css", "report.js"


def check_report(path: Path, *, model: str, output: Path) -> None:
    """`OptionError` unless the path's suffix is .html, `OutputError` where no report could be written to it: before the work."""
    if path.suffix != ".html":
        raise OptionError(f"the report is {path}; its suffix must be .html")
    check_output(path, inputs=[Path(model)] if Path(model).is_file() else [])
    if os.path.realpath(path) == os.path.realpath(output):
        raise OutputError(f"cannot write the report {path}: it is the output {output} as well")


def write_report(
    result: Result, path: str | os.PathLike[str], *, command: Sequence[str] = (), progress: Progress | None = None
) -> None:
    """Write what came of a run to `path` as one page of HTML that loads nothing from anywhere.

    What a result does not hold is measured on its samples first: every layer alone, and the images against the BatchNorms.
    `command` is what the run was called with, where that is known.
    """
    atomic_write(Path(path), render(gather(result, command=command, progress=progress)).encode(errors="replace"))


def render(facts: Facts) -> str:
    """The page; whatever comes from a model or a file is text in it, never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["file_name"] = file_name
    template = environment.from_string(_read(TEMPLATE))
    return template.render(facts=facts, style=Markup(_read(STYLE)), script=Markup(_read(SCRIPT)))


def _read(name: str) -> str:
    return files("dreamquant.report").joinpath(name).read_text(encoding="utf-8")
