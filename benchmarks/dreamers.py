"""Every dreamer on one protocol: top-1 by bits and seed, seconds of synthesis, and measures of the images.

    python benchmarks/dreamers.py DATA --suite resnet20 [--only zeroq dsg ...] [--seeds 3] [--bits W8A8 W6A6 W4A4]

DATA holds the folders cifar10 and imagenet. Protocol `zeroq`: all layers the same bits, outputs of activation functions, min-max
ranges. Top-1 is that of the exported file in ONNX Runtime. A row that is already in the results is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dreamquant
from dreamquant.assess.dreams import measure
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.flow import versions
from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples
from dreamquant.storage import load_samples, save_samples

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results" / "dreamers.jsonl"


@dataclass(frozen=True)
class Dream:
    """One line of the table: a method, its options, how many images, and the budget of what is left open."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    count: int = 64
    budget: str = "paper"


CIFAR_CLASSES = {"batch": 16, "lower": 0.05, "target": 0.95}
OURS = {
    "noise": Dream("noise"),
    "fractal": Dream("fractal"),
}
FREE = OURS | {
    "real": Dream("real"),
    "rsd": Dream("rsd", budget="standard"),
    "rsd, noise start": Dream("rsd", {"start": "published"}, budget="standard"),
    "anchored": Dream("anchored"),
}
SUITES: dict[str, tuple[str, str, dict[str, Dream]]] = {
    "resnet20": (
        "cifar10/resnet20.pt2",
        "cifar10",
        OURS
        | {
            "real": Dream("real"),
            "zeroq": Dream("zeroq"),
            "dsg": Dream("dsg"),
            "dsg, 40 images": Dream("dsg", count=40),
            "dsg, neither": Dream("dsg", {"slack": False, "enhance": False}),
            "dsg, slack only": Dream("dsg", {"enhance": False}),
            "dsg, enhancement only": Dream("dsg", {"slack": False}),
            "rsd": Dream("rsd"),
            "genie, 600 steps": Dream("genie", {"steps": 600, "batch": 64}),
            "gdfq": Dream("gdfq", {"conditioning": "embedding"}),
            "lrq_generator": Dream("lrq_generator", {"conditioning": "embedding"}),
            "intraq, 300 steps": Dream("intraq", {"steps": 300, **CIFAR_CLASSES}),
            "lrq, 300 steps": Dream("lrq", {"steps": 300, **CIFAR_CLASSES}),
            "zeroq, standard": Dream("zeroq", budget="standard"),
            "dsg, standard": Dream("dsg", budget="standard"),
            "dsg, standard, 40 images": Dream("dsg", count=40, budget="standard"),
            "dsg, standard, neither": Dream("dsg", {"slack": False, "enhance": False}, budget="standard"),
            "dsg, standard, slack only": Dream("dsg", {"enhance": False}, budget="standard"),
            "dsg, standard, enhancement only": Dream("dsg", {"slack": False}, budget="standard"),
            "rsd, standard": Dream("rsd", budget="standard"),
            "genie, standard": Dream("genie", {"batch": 64}, budget="standard"),
            "gdfq, standard": Dream("gdfq", {"conditioning": "embedding"}, budget="standard"),
            "intraq, standard": Dream("intraq", {"lower": 0.05, "target": 0.95}, budget="standard"),
            "lrq, standard": Dream("lrq", {"lower": 0.05, "target": 0.95}, budget="standard"),
        },
    ),
    "mobilenetv1": (
        "imagenet/mobilenetv1_025.pt2",
        "nips2017",
        OURS
        | {
            "real": Dream("real"),
            "zeroq": Dream("zeroq", budget="standard"),
            "dsg": Dream("dsg", budget="standard"),
            "dsg, neither": Dream("dsg", {"slack": False, "enhance": False}, budget="standard"),
            "dsg, slack only": Dream("dsg", {"enhance": False}, budget="standard"),
            "dsg, enhancement only": Dream("dsg", {"slack": False}, budget="standard"),
            "rsd": Dream("rsd", budget="standard"),
            "intraq": Dream("intraq", {"steps": 50}, budget="standard"),
            "lrq": Dream("lrq", {"steps": 50}, budget="standard"),
            "genie": Dream("genie", {"batch": 64, "width": 32}, budget="quick"),
            "gdfq": Dream("gdfq", budget="quick"),
            "lrq_generator": Dream("lrq_generator", budget="quick"),
            "zeroq, published": Dream("zeroq"),
            "dsg, published": Dream("dsg"),
        },
    ),
    "squeezenet": ("imagenet/squeezenet1_1.onnx", "nips2017", FREE),
    "mobilenetv1_bnfolded": ("imagenet/mobilenetv1_025_bnfolded.onnx", "nips2017", FREE),
    "mobilenetv2_bnfolded": ("imagenet/mobilenetv2_imagenette.onnx", "val10x50", FREE),
    "resnet20_bnfolded": ("cifar10/resnet20_bnfolded.onnx", "cifar10", FREE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--only", nargs="+", help="labels of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W6A6", "W4A4"])
    parser.add_argument("--cache", type=Path, default=Path("runs/dreamers"), help="images that were dreamt, to measure again")
    parser.add_argument("--table", action="store_true", help="print the table of the rows that there are, and measure nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.suite, given.bits))
        return
    torch.set_num_threads(1)
    model, images, dreams = SUITES[given.suite]
    network = dreamquant.load(given.data / model, mean=MEAN, std=STD)
    labelled, photographs = load_images(given.data, images, network)
    done = {key(row) for row in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else set()
    for seed in given.seeds:
        for label in given.only or dreams:
            rows = [{"suite": given.suite, "label": label, "seed": seed, "bits": bits} for bits in given.bits]
            missing = [row for row in rows if key(row) not in done]
            if missing:
                samples, seconds = dream(
                    network, dreams[label], photographs, seed, given.cache / f"{given.suite}-{label}-{seed}.safetensors"
                )
                run(network, dreams[label], samples, seconds, missing, labelled, photographs)


def table(suite: str, bits: list[str]) -> str:
    """The results of a suite as Markdown: means over seeds, half the distance between the extremes behind them."""
    rows = [row for row in map(json.loads, RESULTS.read_text().splitlines()) if row["suite"] == suite]
    lines = [
        f"| images | {' | '.join(bits)} | seconds | confidence | classes | feature diversity | spread | coverage |",
        f"|---|{'---:|' * (len(bits) + 6)}",
    ]
    for label in dict.fromkeys([*SUITES[suite][2], *(row["label"] for row in rows)]):
        mine = [row for row in rows if row["label"] == label]
        if not mine:
            continue
        cells = [spread([row["top1"] for row in mine if row["bits"] == width]) for width in bits]
        cells += [mean(mine, name, form) for name, form in COLUMNS.items()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLUMNS = {
    "processor_seconds": "{:.0f}",
    "confidence": "{:.2f}",
    "classes": "{:.0f}",
    "feature_diversity": "{:.2f}",
    "bn_spread": "{:.2f}",
    "coverage": "{:.2f}",
}


def mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return form.format(np.mean(values)) if values else "-"


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    around = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{around}"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("suite", "label", "seed", "bits"))


def load_images(data: Path, which: str, network: Network) -> tuple[LabelledImages, torch.Tensor]:
    """Images to evaluate on, and 1,000 or fewer others (N, C, H, W) as the real reference."""
    if which == "cifar10":
        test, train = (load_labelled(data / f"cifar10/cifar10_{name}.npz") for name in ("test", "train20k"))
        return test, decoded(train, network)
    names = ("nips2017", "val10x50") if which == "nips2017" else ("val10x50", "nips2017")
    columns = ("label10" if which == "val10x50" else "label", "label")
    first, other = (
        load_labelled(data / f"imagenet/{name}.zip", labels=data / f"imagenet/{name}_labels.csv", label_column=column)
        for name, column in zip(names, columns, strict=True)
    )
    return first, decoded(other, network)


def decoded(real: LabelledImages, network: Network) -> torch.Tensor:
    batches = real.spread(1000).batches(100, input_shape=network.input_shape, mean=MEAN, std=STD)
    return torch.from_numpy(np.concatenate([images for images, _ in batches]))


def drawn(photographs: torch.Tensor, count: int, seed: int) -> Samples:
    """Real images, drawn by `seed`."""
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed))
    return Samples(photographs[order[:count]], method="real", seed=seed)


def dream(network: Network, dream: Dream, photographs: torch.Tensor, seed: int, cached: Path) -> tuple[Samples, dict[str, float]]:
    """The images of a line, made now or before with the same settings, and what making them took."""
    if dream.method == "real":
        return drawn(photographs, dream.count, seed), {"seconds": 0.0, "processor_seconds": 0.0}
    options = find_method("synthesis", dream.method).budget(dream.budget) | dream.options
    made_by = {"method": dream.method, "seed": seed, "count": dream.count, **options}
    timing = cached.with_suffix(".json")
    samples = load_samples(cached, made_by)
    if samples is None or not timing.exists():
        wall, processor = time.perf_counter(), time.process_time()
        samples = dreamquant.synthesize(network, dream.count, method=dream.method, seed=seed, **options)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_samples(samples, cached, made_by)
        timing.write_text(json.dumps({"seconds": round(wall, 1), "processor_seconds": round(processor, 1)}))
    return samples, json.loads(timing.read_text())


def run(
    network: Network,
    dream: Dream,
    samples: Samples,
    seconds: dict[str, float],
    rows: list[dict[str, Any]],
    labelled: LabelledImages,
    photographs: torch.Tensor,
) -> None:
    measured = measure(network, samples, real=drawn(photographs, dream.count, 1000).images)
    norms = measured.norms
    common = {
        "protocol": "zeroq",
        "method": dream.method,
        "options": samples.options,
        "count": len(samples),
        **seconds,
        "threads": 1,
        "loss": samples.losses[-1] if samples.losses else None,
        "confidence": measured.classes.confidence if measured.classes else None,
        "classes": measured.classes.distinct if measured.classes else None,
        "feature_diversity": round(measured.feature_diversity, 4),
        "pixel_diversity": round(measured.pixel_diversity, 4),
        "bn_mean_distance": round(float(np.mean([norm.mean_distance for norm in norms])), 4) if norms else None,
        "bn_std_distance": round(float(np.mean([norm.std_distance for norm in norms])), 4) if norms else None,
        "bn_spread": round(float(np.mean([norm.spread for norm in norms])), 4) if norms else None,
        "coverage": round(measured.coverage.mean, 3) if measured.coverage else None,
    }
    for row in rows:
        student = dreamquant.quantize(network, samples, bits=row["bits"], plan="zeroq")
        with tempfile.TemporaryDirectory() as folder:
            artifact = dreamquant.export(student, Path(folder) / "student.onnx", samples)
            found = evaluate(onnx_runner(artifact.path), labelled, input_shape=network.input_shape, mean=MEAN, std=STD, batch=100)
        full = row | common | {"top1": found.top1, "images": found.images, **versions()}
        print(
            row["suite"],
            row["label"],
            row["bits"],
            row["seed"],
            f"{found.top1:.2f}",
            f"{common['processor_seconds']} s",
            flush=True,
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(full) + "\n")


if __name__ == "__main__":
    main()
