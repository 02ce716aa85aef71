"""Measure suites of cases: accuracy, size, latency and cost of each way to quantize, one JSON row a case.

    python -m benchmarks.run --suite dfq --data DATA [--only TEXT ...] [--seeds 0 1 2]
    python -m benchmarks.run --suite dfq --table
    python -m benchmarks.run --suite digits --again --only auto W4A4

A case that has its row in `benchmarks/results/SUITE.jsonl` is not run again. Top-1 is that of the exported file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
import time
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import dreamquant
from benchmarks.models import MODELS, network, normalisation, real_samples, test_images
from benchmarks.suites import SUITES, Case, RecipeCase, SpeedCase
from benchmarks.tables import table
from dreamquant.allocation import allocate
from dreamquant.assess.assess import float_file
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.latency import compare_latency, processor_name
from dreamquant.assess.probes import probe, probe_images
from dreamquant.exporters.export import Artifact
from dreamquant.flow import versions
from dreamquant.methods import find_method
from dreamquant.network.notes import shape_of
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.student import Student
from dreamquant.reconstruction import reconstruct
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples
from dreamquant.storage import load_samples, save_samples
from dreamquant.synthesis import widened
from dreamquant.training import train

RESULTS = Path(__file__).parent / "results"
CACHE = Path("runs/samples")
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the data folder; the suite digits needs none")
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="cases of which each of these texts is in the model, label or bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="print the rows that there are as Markdown, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure cases that have a row once more, and print both")
    given = parser.parse_args()
    place = RESULTS / f"{given.suite}.jsonl"
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    if given.table:
        print(table(rows))
        return
    if given.data is None and given.suite != "digits":
        parser.error("--data is needed: the folder of models and images")
    torch.set_num_threads(1)
    done = {key(row): row for row in rows}
    for seed in given.seeds:
        for case in SUITES[given.suite]():
            names = {"model": case.model, "label": case.label, "bits": case.bits, "plan": case.plan, "seed": seed}
            chosen = all(any(text in str(name) for name in names.values()) for text in given.only)
            if not chosen or (key(names) in done) != given.again:
                continue
            row = names | measure(given.data or Path(), case, seed)
            print(*names.values(), said(row), flush=True)
            if given.again:
                print("    as recorded:", said(done[key(names)]))
                continue
            with place.open("a") as file:
                file.write(json.dumps(row) + "\n")


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    if "ms_per_image" in row:
        return f"{row['ms_per_image']} ms"
    spent = sum(row["processor_seconds"].values())
    return f"top-1 {row['top1']:.2f}, {row['bytes'] / 1e3:.0f} kB, {spent:.0f} processor seconds, commit {row['commit']}"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "label", "bits", "plan", "seed"))


def measure(data: Path, case: Case | RecipeCase | SpeedCase, seed: int) -> dict[str, Any]:
    """One case of any kind."""
    if isinstance(case, RecipeCase):
        return measure_recipe(data, case, seed)
    return measure_step(data, case, seed) if isinstance(case, SpeedCase) else measure_case(data, case, seed)


def measure_step(data: Path, case: SpeedCase, seed: int) -> dict[str, Any]:
    """What a step costs, the fastest of a few after one to warm up."""
    ended: list[float] = []
    method = find_method("synthesis", case.label)
    options = {"steps": STEPS + 1} | ({"batch": case.count} if "batch" in method.options else {})
    dreamquant.synthesize(
        network(data, case.model),
        case.count,
        method=case.label,
        seed=seed,
        callback=lambda *_: ended.append(time.process_time()),
        **options,
    )
    fastest = min(after - before for before, after in pairwise(ended))
    return {"images": case.count, "steps": STEPS, "ms_per_image": round(1000 * fastest / case.count, 3), **circumstances()}


def measure_case(data: Path, case: Case, seed: int) -> dict[str, Any]:
    """One way of quantizing, stage by stage, from the images to the file's accuracy."""
    model = network(data, case.model)
    samples, dreaming = images_of(data, case, seed)
    clock = Clock()
    plan = load_plan(case.plan, **case.changes)
    allocation = allocate(model, samples, plan, bits=case.bits, **case.allocation)
    clock.lap("allocation")
    student = dreamquant.quantize(model, samples, bits=case.bits, plan=allocation.plan)
    clock.lap("quantization")
    student = reconstruct(student, samples, seed=seed, **case.reconstruction)
    clock.lap("reconstruction")
    if case.training is not None:
        student = train(model, student, samples, seed=seed, **case.training)
    clock.lap("training")
    with tempfile.TemporaryDirectory() as folder:
        artifact = dreamquant.export(student, Path(folder) / "student.onnx", samples)
        clock.lap("export")
        found = measure_file(data, case.model, artifact, case.images)
    return {
        "images": case.images,
        "count": len(samples),
        "widen": case.widen,
        "budget": case.budget,
        "options": case.options,
        "changes": case.changes,
        "allocation": case.allocation,
        "reconstruction": case.reconstruction,
        "training": case.training,
        "totals": allocation.totals,
        **found,
        **granularities(student),
        "synthesis_processor_seconds": dreaming,
        "processor_seconds": clock.seconds,
        **circumstances(),
    }


def measure_recipe(data: Path, case: RecipeCase, seed: int) -> dict[str, Any]:
    """One recipe, run as the command line runs it."""
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        result = dreamquant.run(
            data / MODELS[case.model].file,
            Path(folder) / "student.onnx",
            recipe=case.recipe,
            bits=case.bits,
            plan=case.plan,
            budget=case.budget,
            **normalisation(case.model),
            seed=seed,
        )
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        found = measure_file(data, case.model, result.artifact, result.recipe.synthesis.method)
    agreement = result.assessment.agreement
    return {
        "recipe": result.recipe.model_dump(exclude={"published", "variants", "budget"}, exclude_none=True),
        "budget": case.budget,
        "images": result.recipe.synthesis.method,
        "held_out": {"samples": agreement.samples, "top1": agreement.top1, "kl": agreement.kl},
        **found,
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
        "wall_seconds": round(wall, 1),
        "processor_seconds": {"all": round(processor, 1)},
        **circumstances(),
    }


def measure_file(data: Path, name: str, artifact: Artifact, calibrated_by: str) -> dict[str, Any]:
    """What an exported file is worth: accuracy, proof, size, latency, and its answers on the probes of `assess.probes`."""
    model = network(data, name)
    began = time.perf_counter()
    runner = onnx_runner(artifact.path, threads=1)
    load_seconds = time.perf_counter() - began
    found = evaluate(runner, test_images(data, name), input_shape=model.input_shape, mean=model.mean, std=model.std, batch=50)
    with tempfile.TemporaryDirectory() as folder:
        reference = float_file(model, Path(folder))
        latency = compare_latency(reference, artifact.path, input_shape=model.input_shape)
        float_bytes = reference.stat().st_size
    answers = [probe(model, runner, images) for images in probes(data, name, calibrated_by)]
    return {
        "top1": found.top1,
        "float_top1": float_top1(data, name),
        "test_images": found.images,
        "probes": [asdict(answer) for answer in answers],
        "agreement_of_file": artifact.verification.top1_agreement,
        "steps_of_file": asdict(artifact.verification.steps),
        "mean_difference_of_file": artifact.verification.mean_difference,
        "bytes": artifact.size,
        "float_bytes": float_bytes,
        "load_seconds": round(load_seconds, 3),
        "latency_ms": round(latency.b_ms, 3),
        "float_latency_ms": round(latency.a_ms, 3),
        "speed": round(latency.ratio, 3),
        "speed_quartiles": [round(latency.ratio_low, 3), round(latency.ratio_high, 3)],
    }


def circumstances() -> dict[str, Any]:
    """On what, and by what, a row was measured."""
    return {
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "processor": f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **versions(),
    }


@cache
def float_top1(data: Path, name: str) -> float:
    """The float network's accuracy, of its own file in ONNX Runtime, measured once a process."""
    model = network(data, name)
    with tempfile.TemporaryDirectory() as folder:
        runner = onnx_runner(float_file(model, Path(folder)), threads=1)
        return evaluate(
            runner, test_images(data, name), input_shape=model.input_shape, mean=model.mean, std=model.std, batch=50
        ).top1


@cache
def probes(data: Path, name: str, calibrated_by: str) -> list[Samples]:
    """The probes' images, the same for every case of a network and a dreamer, made once."""
    return probe_images(network(data, name), calibrated_by=calibrated_by, seed=1000)


def granularities(student: Student) -> dict[str, Any]:
    """How many layers have a grid for each channel of their weights, and the mean bits of a weight."""
    weights = [tensor for tensor in student.tensors() if tensor.kind == "weight"]
    sizes = [torch.Size(shape_of(tensor.node)).numel() for tensor in weights]
    bits = sum(size * tensor.grid.bits for size, tensor in zip(sizes, weights, strict=True)) / max(sum(sizes), 1)
    return {"layers": len(weights), "channel_layers": sum(t.grid.axis is not None for t in weights), "mean_bits": round(bits, 3)}


def images_of(data: Path, case: Case, seed: int) -> tuple[Samples, float]:
    """The images that a case is calibrated on, and the processor seconds that making them took."""
    if case.images == "real":
        return real_samples(data, case.model, case.count, seed), 0.0
    made_by = {"method": case.images, "count": case.count, "seed": seed, "budget": case.budget, **case.options}
    place = CACHE / ("-".join(str(value) for value in (case.model, *made_by.values())) + ".safetensors")
    timing = place.with_suffix(".json")
    samples = load_samples(place, made_by) if place.exists() else None
    if samples is None or not timing.exists():
        began = time.process_time()
        samples = dreamquant.synthesize(
            network(data, case.model), case.count, method=case.images, seed=seed, budget=case.budget, **case.options
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        save_samples(samples, place, made_by)
        timing.write_text(json.dumps(round(time.process_time() - began, 1)))
    if case.widen:
        samples = widened(network(data, case.model), samples)
    return samples, json.loads(timing.read_text())


class Clock:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, stage: str) -> None:
        now = time.process_time()
        self.seconds[stage], self._last = round(now - self._last, 2), now


def commit() -> str:
    """The commit that is measured, with a plus sign where files differ from it."""
    words = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=True).stdout
    return words + ("+" if changed else "")


if __name__ == "__main__":
    main()
