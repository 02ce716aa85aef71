"""Tables: what is in a cell, what sorts it, and how long its bar is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamquant.assess.dreams import NormMeasures
from dreamquant.assess.probes import Probe
from dreamquant.report.layers import LayerRow
from dreamquant.report.words import DASH, number, seconds

SHORTEST = 0.005  # seconds of a stage that is told
STAGES = {
    "synthesis": "dreaming calibration images",
    "held_out_synthesis": "dreaming held-out images",
    "choice": "choosing ranges",
    "allocation": "choosing bits of layers",
    "quantization": "finding grids",
    "reconstruction": "learning roundings",
    "training": "training",
    "probe_synthesis": "dreaming images to test on",
    "export": "writing and proving the file",
    "assessment": "measuring",
}
COLUMNS = {  # of what allocations measure
    "layer": "layer",
    "count": "count",
    "choice": "choice",
    "decision": "decision",
    "damage": "damage, nats",
    "tensor": "one grid a tensor, nats",
    "channel": "one grid a channel, nats",
    "weight_bits": "bits of weights",
    "input_bits": "bits of input",
}
COUNTS = {"size": "parameters", "operations": "multiplications"}  # by the budget that they are counted for
TOTALS = {
    "all_tensor": "divergence with one grid a tensor",
    "all_channel": "divergence with one grid a channel",
    "hybrid": "divergence as chosen",
    "channel_layers": "layers with a grid a channel",
    "channel_layers_by_gap": "layers that gain by it alone",
    "average": "average of bits",
    "damage": "sum of single damages",
    "divergence": "divergence of the whole",
    "uniform_bits": "bits everywhere, to compare",
    "uniform_divergence": "divergence with these",
    "agreement_before": "agreement before, %",
    "agreement_after": "agreement after, %",
    "agreement_low": "at least, so few images leave possible, %",
    "agreement_high": "at most, %",
    "raised": "layers with more bits",
    "held_out": "images that decided",
    "procedural": "of them procedural",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text; where it is a number, its value to sort by and the length of its bar, 0 to 1."""

    text: str
    value: float | None = None
    share: float | None = None
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its name, whether it holds numbers, and what it holds, in a few words."""

    name: str
    number: bool = False
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted; `sorted` is the number of the column that it is in the order of, the largest first."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sorted: int | None = None


def probe_table(probes: Sequence[Probe]) -> Table:
    """What an estimate rests on: answers on images that had no part in quantizing."""
    columns = (
        Column("images by"),
        Column("images", True),
        Column("agreement", True, "percent with the float network's top class"),
        Column("divergence", True, "nats"),
        Column("margin", True, "mean distance of the float network's two largest scores"),
        Column("shift", True, "how far that distance moves, root mean square"),
        Column("confidence", True, "of the float network, mean"),
    )
    rows = tuple(
        (
            Cell(one.method),
            Cell(str(one.samples), one.samples),
            Cell(f"{one.top1:.1f}", one.top1),
            *(Cell(number(value), value) for value in (one.kl, one.margin, one.shift, one.confidence)),
        )
        for one in probes
    )
    return Table("probes", columns, rows)


def norm_table(norms: Sequence[NormMeasures]) -> Table:
    """Distances of every BatchNorm, in the order of the network."""
    columns = (
        Column("#", True),
        Column("BatchNorm"),
        Column("mean", True, "|mean − μ| / σ"),
        Column("deviation", True, "|std − σ| / σ"),
        Column("spread", True, "of single images' means, in σ"),
    )
    most = [max(values) for values in zip(*(norm.distances for norm in norms), strict=True)]
    rows = tuple(
        (
            Cell(str(place), place),
            Cell(norm.name, kind="name"),
            *(Cell(f"{value:.3f}", value, _share(value, top)) for value, top in zip(norm.distances, most, strict=True)),
        )
        for place, norm in enumerate(norms, start=1)
    )
    return Table("BatchNorms", columns, rows)


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """The layers, in the order in which they are given."""
    columns = (
        Column("layer"),
        Column("operator"),
        Column("weight"),
        Column("W bits", True, "bits of the weights"),
        Column("A bits", True, "bits of what enters"),
        Column("levels shared by"),
        Column("weights alone", True, "damage in nats with nothing quantized but the weights"),
        Column("input alone", True, "damage in nats with nothing quantized but the input"),
        Column("sum", True, "of the two"),
        Column("SQNR", True, "decibels of the output's signal over its error, with all before it quantized"),
    )
    tops = [
        max((value for value in values if value is not None), default=0.0)
        for values in zip(*((row.weights, row.inputs, row.both, row.sqnr) for row in rows), strict=True)
    ]
    known = any(row.both is not None for row in rows)
    return Table("layers", columns, tuple(_layer_cells(row, tops) for row in rows), sorted=8 if known else None)


def _layer_cells(row: LayerRow, tops: Sequence[float]) -> tuple[Cell, ...]:
    bits = "float" if row.note == "float" else DASH
    return (
        Cell(row.name, note=row.weight or (row.note if row.note != "float" else ""), kind="name"),
        Cell(row.operator),
        Cell("×".join(map(str, row.shape)) or DASH, kind="shape"),
        Cell(bits if row.weight_bits is None else str(row.weight_bits), row.weight_bits),
        Cell(DASH if row.input_bits is None else str(row.input_bits), row.input_bits),
        Cell(row.granularity or DASH),
        *(
            Cell(number(value, 2), value, _share(value, top))
            for value, top in zip((row.weights, row.inputs, row.both), tops, strict=False)
        ),
        Cell(
            DASH if row.sqnr is None else f"{row.sqnr:.1f}".replace("-", "−"), row.sqnr, _share(row.sqnr, tops[3]), kind="signal"
        ),
    )


def _share(value: float | None, top: float) -> float | None:
    return None if value is None else max(0.0, min(1.0, value / top)) if top > 0 else 0.0


def allocation_table(rows: Sequence[Mapping[str, Any]], budget: str = "") -> Table | None:
    """What an allocation measured and chose, by layer, the counts being those of a budget; None where nothing was chosen."""
    if not rows:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key, 0), int | float) for row in rows) for key in keys]
    names = COLUMNS | {"count": COUNTS.get(budget, COLUMNS["count"])}
    columns = tuple(Column(names.get(key, f"{key}, nats"), is_number) for key, is_number in zip(keys, numeric, strict=True))
    return Table("allocation", columns, tuple(tuple(_allocated(key, row.get(key)) for key in keys) for row in rows))


def _allocated(key: str, value: object) -> Cell:
    if isinstance(value, int | float):
        return Cell(f"{value:,}" if isinstance(value, int) else number(value), float(value))
    return Cell(DASH if value is None else str(value), kind="name" if key == "layer" else "")


def totals(found: Mapping[str, Any]) -> dict[str, str]:
    """What holds for all layers together."""
    return {
        TOTALS.get(name, name.replace("_", " ")): number(value, 4)
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
        for name, value in found.items()
        if isinstance(value, int | float | str)
    }


def seconds_table(found: Mapping[str, float]) -> Table:
    """How long each stage took; those that took no time were left out of the run."""
    most = max(found.values(), default=0.0)
    rows = tuple(
        (Cell(STAGES.get(name, name.replace("_", " "))), Cell(seconds(value), value, _share(value, most)))
        for name, value in found.items()
        if value >= SHORTEST
    )
    return Table("stages", (Column("stage"), Column("time", True)), rows)
