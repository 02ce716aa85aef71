"""Result -> everything that a report shows: measured where it was not yet, put into words, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dreamquant.allocation import LayerDamage, sensitivities
from dreamquant.assess.dreams import DreamMeasures, NormMeasures, measure
from dreamquant.assess.trust import Trust
from dreamquant.errors import ModelError
from dreamquant.flow import Progress, Result, telling, versions
from dreamquant.report import figures
from dreamquant.report.again import SAVED, command_again, on_lines, recipe_toml
from dreamquant.report.distributions import Close, Panel, close_ups
from dreamquant.report.layers import LayerRow, layer_rows
from dreamquant.report.pictures import Picture, about_pictures, pictures
from dreamquant.report.tables import Table, allocation_table, layer_table, norm_table, probe_table, seconds_table, totals
from dreamquant.report.tiles import Tile, tiles
from dreamquant.report.verdict import Verdict, cautions, verdict
from dreamquant.report.words import seconds

WEIGHED = 32  # samples that layers are weighed and looked at on
WORST = 4  # layers up close
PIXELATED = 64  # pixels of a side: smaller images are shown pixel by pixel


@dataclass(frozen=True)
class Drawn:
    """A layer up close, ready to be shown: (heading, figure, caption) of its weights and of its input."""

    layer: str
    about: str
    parts: tuple[tuple[str, Markup, str], ...]


@dataclass(frozen=True)
class Facts:
    """What a report shows, in the order in which it does."""

    model: str
    output: str
    about: str
    verdict: Verdict
    tiles: tuple[Tile, ...]
    trust: Trust | None
    trust_unknown: tuple[str, ...]
    probes: Table | None
    cautions: tuple[str, ...]
    pictures: tuple[Picture, ...]
    about_pictures: str
    small_pictures: bool
    dreams: Mapping[str, str]
    norms: Table | None
    norms_figure: Markup
    no_norms: str
    layers: Table
    weighed: int
    unweighed: str
    close: tuple[Drawn, ...]
    allocation: Table | None
    allocated_by: str
    totals: Mapping[str, str]
    frontier: Markup
    command: str
    again: str
    saved: str
    recipe: str
    seed: int
    versions: Mapping[str, str]
    seconds: Table


def gather(result: Result, *, command: Sequence[str] = (), progress: Progress | None = None) -> Facts:
    """Everything that a report of a result shows; `command` is what the run was called with, where that is known."""
    damages, unweighed = _weigh(result, progress)
    measures, unmeasured = _measure(result)
    rows = layer_rows(result, damages)
    worst = [row for row in rows if row.weight_bits is not None][:WORST]
    close = close_ups(result.student, result.samples.images[:WEIGHED], [row.name for row in worst])
    recipe, trust = result.recipe, result.assessment.trust
    return Facts(
        model=result.network.source.text,
        output=str(result.artifact.path),
        about=f"{recipe.quantization.bits}, recipe {recipe.name}, plan {recipe.quantization.plan}, seed {result.seed}",
        verdict=verdict(result.assessment, result.network.space),
        tiles=tiles(result),
        trust=trust,
        trust_unknown=tuple(result.assessment.trust_unknown),
        probes=probe_table(result.assessment.probes) if result.assessment.probes else None,
        cautions=tuple(cautions(result, measures)),
        pictures=tuple(pictures(result.samples, result.network)),
        about_pictures=about_pictures(result.samples, result.network),
        small_pictures=max(result.network.input_shape[1:]) < PIXELATED,
        dreams=about_dreams(result, measures),
        norms=norm_table(measures.norms) if measures and measures.norms else None,
        norms_figure=norm_figure(measures.norms) if measures and measures.norms else Markup(),
        no_norms=unmeasured or "The network has no BatchNorm: its statistics were folded into the layers before, or never were.",
        layers=layer_table(rows),
        weighed=min(WEIGHED, len(result.samples)),
        unweighed=unweighed,
        close=tuple(_drawn(row, one) for row, one in zip(worst, close, strict=True)),
        allocation=allocation_table(result.allocation.layers, str(result.allocation.totals.get("budget", ""))),
        allocated_by=recipe.allocation.method,
        totals=totals(result.allocation.totals),
        frontier=frontier_figure(result.allocation.totals),
        command=on_lines(command),
        again=command_again(result),
        saved=SAVED,
        recipe=recipe_toml(recipe),
        seed=result.seed,
        versions=versions() | {"device": result.device},
        seconds=seconds_table(result.seconds),
    )


# ---- measured here


def _weigh(result: Result, progress: Progress | None) -> tuple[list[LayerDamage], str]:
    """What each layer does alone, or why that cannot be told."""
    few = replace(result.samples, images=result.samples.images[:WEIGHED], labels=None, confidence=None)
    callback = telling(progress, "weighing layers for the report")
    try:
        return sensitivities(result.network, few, result.student.plan, str(result.student.bits), callback), ""
    except ModelError as error:
        return [], str(error)


def _measure(result: Result) -> tuple[DreamMeasures | None, str]:
    """What can be said of the dreams, or why nothing can."""
    try:
        return measure(result.network, result.samples), ""
    except ModelError as error:
        return None, str(error)


# ---- put into words and drawn


def about_dreams(result: Result, measures: DreamMeasures | None) -> dict[str, str]:
    """How the images were made, and what the network takes them for."""
    stage, classes = result.recipe.synthesis, None if measures is None else measures.classes
    found = {
        "method": stage.method,
        "the network is": result.network.space.sentence(),
        "images": f"{stage.images} to calibrate on, {stage.held_out} held out",
        "seed": f"{result.seed}, held out {result.seed + 1}",
        "made in": seconds(result.seconds["synthesis"]),
    }
    if result.choice.taken is not None:
        found["ranges found on them"] = result.choice.sentence()
    if classes is not None:
        found["mean confidence"] = f"{classes.confidence:.2f}"
        found["classes"] = f"{classes.distinct} of {classes.classes}; the most frequent three {classes.top3:.0f} % of the images"
        if classes.label_agreement is not None:
            found["taken for what they were dreamed as"] = f"{classes.label_agreement:.0f} %"
    if measures is not None:
        found["diversity"] = f"{measures.feature_diversity:.2f} of features, {measures.pixel_diversity:.2f} of pixels"
    return found


def norm_figure(norms: Sequence[NormMeasures]) -> Markup:
    """The same as lines from the first BatchNorm to the last."""
    mean, deviation, spread = zip(*(norm.distances for norm in norms), strict=True)
    named = [figures.Line("mean", mean), figures.Line("deviation", deviation), figures.Line("spread", spread)]
    return figures.lines(named, "BatchNorm, first to last", "in σ", "Distances of dreams to BatchNorm statistics")


def _drawn(row: LayerRow, close: Close) -> Drawn:
    named: list[tuple[str, Panel | None]] = [("Weights", close.weights), ("Input", close.inputs)]
    about = [row.operator, row.weight, f"W{row.weight_bits}" + ("" if row.input_bits is None else f"A{row.input_bits}")]
    return Drawn(
        close.layer,
        ", ".join(part for part in about if part),
        tuple(
            (heading, figures.histogram(panel.histogram, panel.axis, f"{heading} of {close.layer}"), panel.caption)
            for heading, panel in named
            if panel is not None
        ),
    )


def frontier_figure(found: Mapping[str, Any]) -> Markup:
    """The frontier of mixed precision and the point on it that was chosen; empty where there is none."""
    if not found.get("frontier"):
        return Markup()
    known = [(float(point["average"]), float(point["damage"])) for point in found["frontier"]]
    return figures.frontier(known, (float(found["average"]), float(found["damage"])), "The least damage at each average of bits")


def file_name(text: str) -> str:
    """The last part of a path, or of whatever names a model."""
    return Path(text).name or text
