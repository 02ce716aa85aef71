"""Hostile options: numbers beyond all reason, texts that are none, places that cannot be written or read."""

from __future__ import annotations

from pathlib import Path
from random import Random

import typer
from tests.fuzz.cases import CLOSED, DIGITS, HUGE, QUICK, Case, hostile

from dreamquant.cli import app

MODEL, DATA = str(DIGITS / "digits_bnfolded.onnx"), str(DIGITS / "digits_test.npz")
TEXTS = (
    "",
    " ",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "٣",
    "²",
    "\udcff",
    "a" * 10000,
    "1,2",
    "1;2",
    "\x1b[31m",
    "\n",
    "true",
    "None",
    "../..",
    "é",
    "0x10",
    "1_0",
    "9" * 5000,
)
PLACES = (
    "/dev/full",
    "/dev/null",
    "/dev/stdin",
    "/dev/stdout",
    "/proc/self/mem",
    "",
    ".",
    "..",
    "/",
    "a" * 300 + ".onnx",
    "\udcff.onnx",
    "a\nb.onnx",
    "a" * 5000,
    "folder.onnx",
    "folder",
    "/nowhere/x.onnx",
    "~/x.onnx",
    "/proc/x.onnx",
    "loop.onnx",
    "file/x.onnx",
    "x.npz",
    "x.png",
    "plain",
)


def value(random: Random) -> str:
    return random.choice((str(random.choice(HUGE)), f"-{random.choice(HUGE)}", random.choice(TEXTS)))


def place(random: Random, folder: Path) -> str:
    (folder / "folder.onnx").mkdir()
    (folder / "folder").mkdir()
    (folder / "file").touch()
    (folder / "loop.onnx").symlink_to("loop.onnx")
    return random.choice(PLACES)


COMMANDS = {
    "quantize": ("quantize", MODEL, "-o", "out.onnx", *QUICK),
    "synthesize": ("synthesize", MODEL, "-o", "out.npz", "--method", "noise"),
    "evaluate": ("evaluate", MODEL, DATA),
    "compare": ("compare", MODEL, MODEL, "--rounds", "1", "-n", "2"),
    "inspect": ("inspect", MODEL),
    "dreams": ("dreams", MODEL, DATA),
}


def options_of(command: str) -> list[str]:
    """Every option of a command that takes a value, but those that its base gives already and say where it writes."""
    known = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return sorted(
        name for one in known if not getattr(one, "is_flag", True) for name in one.opts if name not in ("-o", "--output")
    )


@hostile("options")
@hostile("options")
def any_option(random: Random, folder: Path) -> Case:
    command = random.choice(list(COMMANDS))
    base, options = COMMANDS[command], options_of(command)
    added: list[str] = []
    for _ in range(random.choice((1, 1, 2))):
        added += [random.choice(options), value(random)]
    return Case("options", (*base, *added))


@hostile("options")
@hostile("options")
def settings(random: Random, folder: Path) -> Case:
    """`--set` with any stage's options, and any value."""
    names = (
        "synthesis.count", "synthesis.held_out", "synthesis.widen", "synthesis.steps", "synthesis.leaves", "synthesis.method", "synthesis.learning_rate",
        "quantization.deviations", "quantization.effect_limit", "quantization.weight_ranges", "quantization.activation_options.percent", "quantization.first_weight_bits",
        "quantization.layers.conv2d.weight_bits", "quantization.transforms", "allocation.method", "allocation.agreement", "reconstruction.method", "reconstruction.steps",
        "reconstruction.batch", "training.method", "training.epochs", "training.batch", "quantization.bits", "x", "", ".", "synthesis.", "synthesis.count.x",
    )  # fmt: skip
    added = ["--set", f"{random.choice(names)}={value(random)}"]
    more = random.choice(
        (
            (),
            ("--set", "reconstruction.method=qdrop"),
            ("--set", "synthesis.method=rsd"),
            ("--set", "training.method=gdfq"),
            ("--set", "synthesis.method=fractal"),
        )
    )
    return Case("a setting", ("quantize", MODEL, "-o", "out.onnx", *QUICK[:6], *more, *added, "--no-estimate"))


@hostile("options")
def synthesis_counts(random: Random, folder: Path) -> Case:
    method = random.choice(("noise", "fractal", "rsd", "gdfq", "intraq", "genie"))
    return Case(
        "a count",
        (
            "synthesize",
            str(DIGITS / "digits.pt2"),
            "-o",
            random.choice(("out.npz", "out")),
            "--method",
            method,
            "-n",
            str(random.choice(HUGE)),
        ),
    )


@hostile("options")
def outputs(random: Random, folder: Path) -> Case:
    where = place(random, folder)
    works = (
        ("quantize", MODEL, "-o", where, *QUICK),
        ("quantize", MODEL, "-o", "out.onnx", "--run-dir", where, *QUICK),
        ("quantize", MODEL, "-o", "out.onnx", "--report", where, *QUICK),
        ("synthesize", MODEL, "-o", where, "--method", "noise", "-n", "2"),
    )
    return Case(f"output {where[:30]!r}", random.choice(works))


@hostile("options")
def inputs(random: Random, folder: Path) -> Case:
    where = place(random, folder)
    works = (
        ("inspect", where),
        ("quantize", where, "-o", "out.onnx"),
        ("evaluate", MODEL, where),
        ("evaluate", where, DATA),
        ("compare", MODEL, where),
        ("compare", MODEL, MODEL, "--samples", where),
        ("dreams", MODEL, where),
        ("inspect", MODEL, "--plan", where),
        ("quantize", MODEL, "-o", "out.onnx", "--recipe", where),
        ("inspect", f"{where}:x"),
        ("inspect", f"timm:{where}"),
    )
    return Case(f"input {where[:30]!r}", random.choice(works))


@hostile("options")
def standard_output(random: Random, folder: Path) -> Case:
    """A standard output that is full."""
    works = (
        ("inspect", MODEL),
        ("methods",),
        ("recipes", "--json"),
        ("evaluate", MODEL, DATA),
        ("--help",),
        ("quantize", "--help"),
        ("compare", MODEL, MODEL, "-n", "2", "--rounds", "1", "--json"),
    )
    return Case("stdout is full", random.choice(works), out="/dev/full")


@hostile("options")
def closed_pipe(random: Random, folder: Path) -> Case:
    """A standard output that nobody reads any more."""
    works = (("inspect", MODEL), ("methods",), ("recipes", "--json"), ("inspect", "--help"))
    return Case("stdout is a closed pipe", random.choice(works), out=CLOSED)


@hostile("options")
def arguments(random: Random, folder: Path) -> Case:
    """Commands that are none, arguments that are missing or too many."""
    known = (
        "quantize",
        "inspect",
        "evaluate",
        "--help",
        "-o",
        "--set",
        "--",
        "-",
        "--seed",
        "--json",
        MODEL,
        "x",
        "",
        "\udcff",
        "-n",
        "--nothing",
        "methods",
        "\x1b[0m",
    )
    return Case("arguments", tuple(random.choice(known) for _ in range(random.randrange(1, 5))))
