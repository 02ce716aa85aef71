"""Rows of results as Markdown. A cell is the mean over seeds, and behind it half the distance between the extremes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from dreamquant.recipe import load_recipe

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """The table that fits what the rows hold; those of one suite are of one kind."""
    if not rows:
        return "No rows yet."
    if "ms_per_image" in rows[0]:
        return _steps(rows)
    if "recipe" in rows[0]:
        return _recipes(rows)
    if any(_learned(row) for row in rows):
        return _learnt(rows)
    return _granularities(rows)


NAMES = {
    "mobilenetv1": "MobileNetV1 x0.25",
    "mobilenetv1_bnfolded": "the same, BatchNorm folded",
    "squeezenet": "SqueezeNet 1.1, no BatchNorm",
    "mobilenetv2": "MobileNetV2, ten classes",
    "mobilenetv2_bnfolded": "the same, BatchNorm folded",
    "resnet20": "CIFAR-10 ResNet-20",
    "resnet20_bnfolded": "the same, BatchNorm folded",
    "resnet56": "CIFAR-10 ResNet-56",
    "digits": "digits (with this project)",
}


def summary(ours: list[Row], noise: list[Row], real: list[Row]) -> str:
    """The default recipe beside the same plan calibrated on noise and on real images, a line a network, width and budget."""
    lines = [
        "| network | test images | bits | float | noise | DreamQuant | real images | size | speed |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for bits, model, budget in product(("W8A8", "W4A4"), NAMES, ("standard", "quick")):
        mine, *others = (
            [row for row in rows if (row["model"], row["bits"], _budget(row)) == (model, bits, budget)]
            for rows in (ours, noise, real)
        )
        if not mine:
            continue
        first = mine[0]
        on_noise, on_real = (_mean([row["top1"] for row in rows]) for rows in others)
        cells = [
            NAMES[model] + (", budget `quick`" if budget == "quick" else ""),
            f"{first['test_images']:,}",
            bits,
            f"{first['float_top1']:.2f}",
            on_noise,
            f"**{_mean([row['top1'] for row in mine])}**",
            on_real,
            f"{first['bytes'] / first['float_bytes']:.2f}",
            f"{first['speed']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _budget(row: Row) -> str:
    return "quick" if row["label"].endswith(", quick") else "standard"


def _steps(rows: list[Row]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| method | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for method in dict.fromkeys(row["label"] for row in rows):
        cells = (
            _mean([row["ms_per_image"] for row in rows if (row["label"], row["model"]) == (method, model)]) for model in models
        )
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _recipes(rows: list[Row]) -> str:
    """One table a plan, for plans are protocols; what was published is of other networks, and stands in a column of its own."""
    parts = []
    for plan in dict.fromkeys(row["plan"] for row in rows):
        lines = [
            f"Plan `{plan}`:",
            "",
            "| network | recipe, budget | bits | float | top-1 | size | speed | file = student | processor s | published |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for (model, label, bits), mine in _cases(row for row in rows if row["plan"] == plan):
            first = mine[0]
            cells = [
                f"{first['float_top1']:.2f}",
                _mean([row["top1"] for row in mine]),
                f"{first['bytes'] / first['float_bytes']:.3f}",
                f"{first['speed']:.2f}",
                _proven(mine),
                _mean([row["processor_seconds"]["all"] for row in mine], "{:.0f}"),
                _published(first["recipe"]["name"], bits),
            ]
            lines.append(f"| {model} | {label} | {bits} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _proven(rows: list[Row]) -> str:
    """Percent of the top-1 that the files keep at least, and of that which they keep where each layer is taken by itself."""
    steps = [row["steps_of_file"] for row in rows if "steps_of_file" in row]
    kept = f"{min(row['agreement_of_file'] for row in rows):.1f} %"
    if not steps or any(step["apart"] for step in steps):
        return kept
    return f"{kept}, {min(step['top1_agreement'] for step in steps):.1f} %"


def _published(recipe: str, bits: str) -> str:
    """A recipe's published figure at these bits, with its network."""
    found = [one for one in load_recipe(recipe).published if one.get("bits") == bits and "top1" in one]
    return (
        "; ".join(f"{one['model']} {one['top1']}" + (f" of {one['float']}" if "float" in one else "") for one in found[:2]) or "-"
    )


def _learnt(rows: list[Row]) -> str:
    """One line a network and label, one column a width."""
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    lines = [
        f"| network | | float | {' | '.join(widths)} | processor s | of them synthesis |",
        "|---|---|---:|" + "---:|" * (len(widths) + 2),
    ]
    for model, label in dict.fromkeys((row["model"], row["label"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["label"]) == (model, label)]
        cells = [_mean([row["top1"] for row in mine if row["bits"] == width]) for width in widths]
        both = [_seconds(row) for row in mine], [row["synthesis_processor_seconds"] for row in mine]
        cells += [f"{sum(seconds) / len(seconds):.0f}" for seconds in both]  # over widths and seeds: no spread of anything
        lines.append(f"| {model} | {label} | {mine[0]['float_top1']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _granularities(rows: list[Row]) -> str:
    lines = [
        "| network | | bits | top-1 | size | speed | per channel | mean bits | allocation s | file = student |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (model, label, bits), mine in _cases(rows):
        first = mine[0]
        cells = [
            _mean([row["top1"] for row in mine]),
            f"{first['bytes'] / first['float_bytes']:.3f}",
            f"{first['speed']:.2f}",
            f"{first['channel_layers']} of {first['layers']}",
            f"{first['mean_bits']:.2f}",
            f"{first['processor_seconds']['allocation']:.0f}",
            _proven(mine),
        ]
        lines.append(f"| {model} | {label} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _learned(row: Row) -> bool:
    return bool(row.get("training")) or row.get("reconstruction", {}).get("method", "nearest") != "nearest"


def _seconds(row: Row) -> float:
    return float(sum(row["processor_seconds"].values())) + float(row["synthesis_processor_seconds"])


def _cases(rows: Iterable[Row]) -> Iterable[tuple[tuple[str, str, str], list[Row]]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["label"], row["bits"]), []).append(row)
    return found.items()


def _mean(values: list[float], form: str = "{:.2f}") -> str:
    if not values:
        return "-"
    spread = f" ± {form.format((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
    return form.format(sum(values) / len(values)) + spread
