"""What the command line draws on the terminal: progress, and the tables of results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from dreamquant.assess.compare import Comparison
from dreamquant.assess.contents import Contents
from dreamquant.assess.dreams import DreamMeasures
from dreamquant.assess.evaluate import Evaluation, Judgement
from dreamquant.assess.inspection import Inspection
from dreamquant.conformity import Conformity
from dreamquant.flow import Result
from dreamquant.methods import FAMILIES, find_method, method_names
from dreamquant.recipe import Recipe


def console(*, stderr: bool = False) -> Console:
    """A console that prints names of files and tensors as they are."""
    return Console(stderr=stderr, markup=False, highlight=False)


def announce(text: str) -> None:
    """Say something on the error stream, where that is a terminal."""
    screen = console(stderr=True)
    if screen.is_terminal:
        screen.print(text)


def print_json(found: object, *, indent: int | None = 2) -> None:
    print(json.dumps(found, indent=indent))  # noqa: T201


@contextmanager
def progress_bars(hidden: bool) -> Iterator[Any]:
    """A function (stage, done, total, loss) that draws progress where the error stream is a terminal, else nothing."""
    screen = console(stderr=True)
    if hidden or not screen.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, total=total, note=f"loss {loss:.3g}" if loss else "")

        yield show


def print_conformity(found: Conformity, file: Path) -> None:
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False)
    for rule, count in found.counts.items():
        table.add_row(rule, "kept" if not count else f"broken {count:,} times" if count > 1 else "broken")
        for finding in found.findings:
            if finding.rule == rule:
                table.add_row("", f"{finding.node} {finding.text}")
    screen = console()
    screen.print(table)
    kept = "keeps all rules" if found.conforms else "does not keep the rules"
    screen.print(f"{file} {kept} of {found.target} ({found.runtime})", soft_wrap=True)


def print_result(result: Result, report: Path | None = None) -> None:
    assessment, proof = result.assessment, result.artifact.verification
    chosen = result.recipe
    screen = console()
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False)
    if not assessment.fast:
        table.add_row(
            "slow", f"{assessment.too_slow()}{'' if result.fastest else '; --fastest leaves in float what is faster so'}"
        )
    table.add_row("file", f"{result.artifact.path}  ({chosen.quantization.bits}, plan {chosen.quantization.plan})")
    space = result.network.space
    table.add_row("input", space.sentence())
    table.add_row(
        "proof",
        f"in ONNX Runtime, {proof.top1_agreement:.2f} % of {proof.samples} samples keep the student's top-1;"
        f" largest difference {proof.largest_difference:.3g}",
    )
    table.add_row("", str(proof.steps))
    table.add_row("", f"all {proof.stored:,} tensors that it stores are the student's, read back")
    if result.artifact.conformity is not None:
        table.add_row("target", result.artifact.conformity.sentence())
    agreement = assessment.agreement
    for place, (output, told) in enumerate(zip(result.network.outputs, agreement.outputs, strict=True)):
        table.add_row("answers" if place == 0 else "", str(output))
        table.add_row("agreement" if place == 0 else "", f"{told.text}, on {agreement.samples} held-out images")
    if assessment.trust is not None:
        trust = assessment.trust
        table.add_row(
            "estimate",
            f"about {trust.drop:.1f} % of the float network's right answers lost, {trust.low:.1f} to {trust.high:.1f} in"
            f" {trust.level:.0f} % of the cases it rests on ({trust.cases}, of {trust.networks} networks with the same say)",
        )
    for place, why in enumerate(assessment.trust_unknown):
        table.add_row("estimate" if place == 0 else "", f"none: {why}" if place == 0 else why)
    if not space.checked:
        table.add_row("", f"all this holds only if the network is fed {space.numbers()}, which nothing in it confirms")
    worst = sorted(assessment.layers, key=lambda layer: layer.sqnr)[:3]
    table.add_row("weakest layers", ", ".join(f"{layer.layer} {layer.sqnr:.1f} dB" for layer in worst))
    if result.choice.taken is not None:
        table.add_row("ranges", result.choice.sentence())
    if result.allocation.layers:
        table.add_row("layers", _allocated(result))
    if assessment.float_layers:
        table.add_row("left in float", ", ".join(assessment.float_layers))
    table.add_row(
        "size",
        f"{result.artifact.size / 1e6:.2f} MB, {result.artifact.size / assessment.float_size:.2f} of"
        f" {assessment.float_size / 1e6:.2f} MB",
    )
    latency = assessment.latency
    elsewhere = f"; nothing is known of {assessment.made_for}, which the file is for" if assessment.made_for else ""
    table.add_row(
        "latency",
        f"{latency.b_ms:.2f} ms, float {latency.a_ms:.2f} ms: {latency.ratio:.2f} times as fast"
        f" ({latency.runtime}, {latency.threads} thread, batch {latency.batch}{elsewhere})",
    )
    if result.fastest is not None:
        table.add_row("fastest", str(result.fastest))
    if chosen.because:
        table.add_row("chosen", chosen.because)
    stage = chosen.synthesis
    widened = f", widened to {stage.images}" if stage.widen else ""
    seconds = result.seconds["synthesis"]
    made = result.samples.method
    by = f"{stage.method}, {stage.count} images{widened}" if made == stage.method else f"{made}, {len(result.samples)} in all"
    table.add_row("calibrated on", f"{by}, {seconds:.1f} s, seed {result.seed}")
    if report is not None:
        table.add_row("report", str(report))
    screen.print(table)


def _allocated(result: Result) -> str:
    """What an allocation decided, in one line."""
    totals = {name: value for name, value in result.allocation.totals.items() if isinstance(value, int | float | str)}
    interval = ""
    if "agreement_low" in totals:
        low, high = totals.pop("agreement_low"), totals.pop("agreement_high")
        interval = f"{totals['agreement_after']:.1f} % of {totals['held_out']} images agree ({low:.1f} to {high:.1f}); "
    return f"{result.recipe.allocation.method}: {interval}" + ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in totals.items()
    )


def print_inspection(found: Inspection) -> None:
    screen = console()
    batch = "any batch" if found.batch is None else f"batch {found.batch} only"
    screen.print(f"{found.model}: images {found.input_shape}, {batch}")
    for line in (*found.remarks, *(f"output {output}" for output in found.outputs)):
        screen.print(line, soft_wrap=True)
    table = Table("layer", "operator", "weight", "output")
    for layer in found.layers:
        table.add_row(layer.name, layer.operator, str(layer.weight), str(layer.output))
    screen.print(table)
    screen.print(f"{len(found.batch_norms)} BatchNorms" + ("" if found.batch_norms else " (folded, or never there)"))
    screen.print(f"{len(found.attentions)} attentions")
    table = Table("segment", "from", "to", "layers")
    for number, segment in enumerate(found.segments):
        table.add_row(str(number), segment.input, segment.output, ", ".join(segment.layers))
    screen.print(table)
    table = Table("quantized tensor", "bits", "on the grid of")
    for site in found.sites:
        table.add_row(site.tensor, str(site.bits), site.grid_of)
    screen.print(table)
    if found.sensitivity is not None:
        table = Table(
            "layer", Column("weights", justify="right"), Column("input", justify="right"), title="what each costs alone, KL"
        )
        for damage in found.sensitivity:
            table.add_row(damage.layer, f"{damage.weights:.2e}", f"{damage.activations:.2e}")
        screen.print(table)
    for name, lack in found.synthesis.items():
        screen.print(f"synthesis {name}: {lack or 'possible'}")


def print_evaluation(found: Evaluation) -> None:
    console().print(f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.images} images, {found.seconds:.1f} s")


def print_judgement(found: Judgement) -> None:
    figures = ", ".join(f"{name} {value:{figure_form(name)}}" for name, value in found.figures.items())
    console().print(f"{found.output}, {found.kind}: {figures}, {found.images} images, {found.seconds:.1f} s")


def figure_form(name: str) -> str:
    """How a figure is written: errors with more digits, all else in percent."""
    return ".4g" if name.endswith("error") else ".2f"


def print_dreams(found: DreamMeasures) -> None:
    screen = console()
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False)
    table.add_row("images", str(found.images))
    table.add_row(
        "diversity", f"{found.feature_diversity:.3f} of features, {found.pixel_diversity:.3f} of pixels (mean 1 - cosine)"
    )
    classes, coverage, norms = found.classes, found.coverage, found.norms
    if classes is not None:
        table.add_row(
            "classes",
            f"{classes.distinct} of {classes.classes}, the most frequent three {classes.top3:.1f} %,"
            f" mean confidence {classes.confidence:.3f}",
        )
        if classes.label_agreement is not None:
            table.add_row("labels", f"{classes.label_agreement:.1f} % predicted as labelled")
    if coverage is not None:
        table.add_row(
            "ranges",
            f"{coverage.mean:.2f} times as wide as on {coverage.real_images} real images, at worst {coverage.worst:.2f}"
            f" ({len(coverage.sites)} tensors of plan {coverage.plan})",
        )
    means = [sum(values) / len(norms) for values in zip(*(norm.distances for norm in norms), strict=True)]
    table.add_row("BatchNorm", "mean {:.3f}, std {:.3f} away, spread {:.3f}".format(*means) if norms else "none")
    screen.print(table)
    if norms:
        table = Table("BatchNorm", "mean", "std", "spread")
        for norm in norms:
            table.add_row(norm.name, *(f"{value:.3f}" for value in norm.distances))
        screen.print(table)


def print_comparison(found: Comparison) -> None:
    screen = console()
    table = Table("", Column("A", overflow="fold"), Column("B", overflow="fold"))
    for name, one, other in [*_stored_rows(found), *_measured_rows(found)]:
        table.add_row(name, one, other)
    screen.print(table)
    screen.print(f"B against A on {found.images}")
    titles = ("relative L2", "SQNR", "largest", "cosine", "same", "KL")
    table = Table(Column("output", overflow="fold"), *(Column(title, justify="right") for title in titles))
    for output in found.outputs:
        shape = ", ".join("N" if size is None else str(size) for size in output.shape)
        table.add_row(
            f"{output.name} ({shape})",
            _number(output.relative_l2, ".4f"),
            _number(output.sqnr, ".1f", " dB"),
            _number(output.largest, ".3g"),
            _number(output.cosine, ".5f"),
            _number(output.top1 if output.agreement is None else output.agreement, ".2f", " %"),
            _number(output.kl, ".2e"),
        )
    screen.print(table)
    for output in found.outputs:
        if output.unit is not None:
            screen.print(f"{output.name}: {output.kind}, same is {output.unit}")
    for note in found.notes:
        screen.print(f"note: {note}")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _stored_rows(found: Comparison) -> list[tuple[str, str, str]]:
    a, b = found.a, found.b
    return [
        ("file", a.path, b.path),
        ("size", f"{a.bytes / 1e6:.2f} MB", f"{b.bytes / 1e6:.2f} MB, {found.size_ratio:.2f} of A"),
        ("operators", str(a.operators), str(b.operators)),
        ("layers", _layers(a), _layers(b)),
        ("numbers", _numbers(a), _numbers(b)),
    ]


def _layers(file: Contents) -> str:
    """How many of a file's layers are quantized, by operator."""
    groups = {"quantized": file.quantized, "in the weights only": file.weights_only, "float": file.floats}
    parts = [f"{how}: {', '.join(f'{count} {name}' for name, count in group.items())}" for how, group in groups.items() if group]
    return "; ".join(parts) or "none"


def _numbers(file: Contents) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in file.numbers.items()) or "none"


def _measured_rows(found: Comparison) -> list[tuple[str, str, str]]:
    rows = []
    latency, accuracy = found.latency, found.accuracy
    if latency is not None:
        how = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}, batch {latency.batch}, {latency.runtime}"
        faster = f"{latency.ratio:.2f} times as fast (quartiles {latency.ratio_low:.2f} to {latency.ratio_high:.2f})"
        rows.append(("latency", f"{latency.a_ms:.3f} ms ({how})", f"{latency.b_ms:.3f} ms, {faster}"))
    if found.worth is not None:
        for name, (one, other) in found.worth.figures.items():
            told = f"{one:{figure_form(name)}} of {found.worth.images} images"
            rows.append((name, told, f"{other:{figure_form(name)}} ({found.worth.output}, {found.worth.kind})"))
    if accuracy is not None:
        change = f"{accuracy.difference:+.2f} points, 95 % from {accuracy.low:+.2f} to {accuracy.high:+.2f}"
        rows += [
            ("top-1", f"{accuracy.a_top1:.2f} % of {accuracy.images}", f"{accuracy.b_top1:.2f} % ({change})"),
            ("top-5", f"{accuracy.a_top5:.2f} %", f"{accuracy.b_top5:.2f} %"),
            ("right alone", str(accuracy.only_a), str(accuracy.only_b)),
        ]
    return rows


def print_recipes(found: Sequence[Recipe]) -> None:
    table = Table("recipe", "what it does", "paper")
    for recipe in found:
        table.add_row(recipe.name, recipe.summary, recipe.paper)
    console().print(table)


def print_methods() -> None:
    table = Table("family", "method", "what it does", "options")
    for family in FAMILIES:
        for name in method_names(family):
            method = find_method(family, name)
            options = ", ".join(f"{key}={parameter.default}" for key, parameter in method.options.items())
            table.add_row(family, name, method.summary, options)
    console().print(table)
