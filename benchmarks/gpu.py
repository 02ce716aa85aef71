"""What a GPU makes of runs that take a processor hours: one row a job, each within its share of the minutes.

    python -m benchmarks.gpu --data DATA [--minutes 8] [--device auto] [--budget small] [--only NAME ...] [--workers 1]

A job is run with a few steps first, to see what a step takes; then with its recipe's full budget or, where that takes longer than
the job may, with as many of its steps as fit, and the row says which part of them (`part`) and how long all would have taken.
A job that has its row for a device is not run again, one whose files are not there is passed over. With several workers so many
jobs share the card, each in a process of its own, and so the times of a step are those of a shared card. Top-1 is that of the
exported file in ONNX Runtime. Budget `small` is for a machine without a GPU: a few steps of each job.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dreamquant
from benchmarks.models import DIGITS, MODELS, labelled, normalisation
from benchmarks.networks import LITE, LITE_FILE, PHOTOGRAPHS, SIDE, SUBJECTS, VIT_FILE, Real
from benchmarks.run import RESULTS
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import LabelledImages
from dreamquant.devices import CPU, device_name, find_device
from dreamquant.flow import _kind, versions
from dreamquant.methods import find_method
from dreamquant.plain import plain_torch
from dreamquant.recipe import Recipe, load_recipe, resolve
from dreamquant.runtime import onnx_runner

ROWS = RESULTS / "gpu.jsonl"
FEW = {"steps": 60, "activation_steps": 60, "epochs": 6, "iterations": 4}  # of a stage, to see what a step takes
TRIED = 128  # images
LATE = 1.25  # of a job's time: then it is stopped
DREAMING = "dreaming calibration images"
STAGES = {
    DREAMING: "synthesis",
    "dreaming held-out images": "synthesis",
    "reconstructing": "reconstruction",
    "training": "training",
}
CIFAR = {"batch": 64, "learning_rate": 1e-4, "warm_up": 4, "conditioning": "embedding"}  # as published for CIFAR
SPARE = 0.8  # of a job's time: what is planned for its steps


@dataclass(frozen=True)
class Job:
    """One run. `share` is its part of all the minutes, `stages` what is set of each stage beside its `budget`."""

    name: str
    model: str
    recipe: str
    bits: str
    share: float
    budget: str = "paper"
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole: bool = False  # and on the processor too, whatever it takes


JOBS = [
    Job("digits W8A8", "digits", "auto", "W8A8", 0.03, "standard", whole=True),
    Job("digits W4A4", "digits", "auto", "W4A4", 0.06, "standard", whole=True),
    Job("resnet20 genie", "resnet20", "genie", "W4A4", 0.4),
    Job("resnet20 gdfq", "resnet20", "gdfq", "W4A4", 0.12, stages={"training": CIFAR | {"batch": 200}}),
    Job("resnet20 lrq", "resnet20", "lrq", "W4A4", 0.12, stages={"training": CIFAR | {"batch": 256, "milestones": "20,40,60"}}),
    Job("resnet20 dsg_qat", "resnet20", "dsg_qat", "W4A4", 0.12, stages={"training": CIFAR | {"batch": 200}}),
    Job("efficientnet_lite0 genie", "efficientnet_lite0", "genie", "W4A4", 0.1),
    Job("efficientnet_lite0 brecq", "efficientnet_lite0", "brecq", "W4A4", 0.05),
    Job("dinov2_s14 auto", "dinov2_s14", "auto", "W4A8", 0.3, "standard"),
]


def main() -> None:
    given = arguments()
    device = find_device(given.device)
    until = time.monotonic() + 60 * given.minutes
    jobs = [job for job in JOBS if not given.only or any(text in job.name for text in given.only)]
    jobs = [job for job in jobs if present(given.data, job)]
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {(row["job"], row["device"]) for row in rows}
    both = [device, CPU] if device != CPU and given.cap is None else [device]
    work = [(job, place) for job in jobs for place in (both if job.whole else [device])]
    work = [(job, place) for job, place in work if (job.name, device_name(place)) not in done]
    if given.workers > 1:
        share = min(1.0, given.workers / max(len(work), 1))
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(lambda one: alone(given, *one, until, share), work))
        return
    if device != CPU and given.cap is None:
        print("float network, cpu and gpu apart by", apart(device), flush=True)
    for job, place in work:
        cap = min(60 * given.minutes * job.share, until - time.monotonic()) if given.cap is None else given.cap
        if cap < 5:
            print(job.name, "left out: no time is left", flush=True)
            continue
        row = {"job": job.name, "device": device_name(place), "torch": torch.__version__, "commit": os.environ.get("COMMIT", "")}
        try:
            row |= measure(given.data, job, place, cap, small=given.budget == "small") | {"versions": versions()}
        except Exception as error:  # the other jobs go on
            print(job.name, place, f"failed: {type(error).__name__}: {error}", flush=True)
            if given.raises:
                raise
            continue
        print(json.dumps(row), flush=True)
        given.rows.parent.mkdir(parents=True, exist_ok=True)
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder; jobs whose files it lacks are passed over")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", choices=("full", "small"), default="full")
    parser.add_argument("--only", nargs="+", default=[], help="jobs that have one of these texts in their names")
    parser.add_argument("--workers", type=int, default=1, help="jobs that share the card, each in a process of its own")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--cap", type=float, help="seconds of each job")
    parser.add_argument("--raises", action="store_true", help="end with the first error")
    return parser.parse_args()


def alone(given: argparse.Namespace, job: Job, place: torch.device, until: float, share: float) -> None:
    """A job in a process of its own."""
    cap = min(60 * given.minutes * share * 0.9, until - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.gpu", "--data", given.data, "--rows", given.rows, "--budget", given.budget]
    command += ["--device", place, "--only", job.name, "--cap", cap, "--minutes", cap / 60]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // given.workers))}
    subprocess.run([str(part) for part in command], check=False, env=os.environ | threads)


def present(data: Path, job: Job) -> bool:
    """Whether the files of a job are there."""
    weights = {"efficientnet_lite0": "efficientnet_lite0.safetensors", "dinov2_s14": "dinov2_s14_head10_fp16.safetensors"}
    file = data / "more" / weights[job.model] if job.model in weights else data / MODELS[job.model].file
    return file.exists()


def source(data: Path, name: str) -> tuple[str, dict[str, Any], LabelledImages]:
    """The model as `load` takes it, what is said of its input, and the images that test it."""
    if name in MODELS:
        return str(data / MODELS[name].file), normalisation(name), labelled(data, *MODELS[name].test)
    if name == "efficientnet_lite0":
        return str(data / LITE_FILE), LITE | SIDE, labelled(data, "imagenet/val10x50", "label")
    (subject,) = (one for one in SUBJECTS if isinstance(one, Real) and one.name == name)
    return str(data / VIT_FILE), PHOTOGRAPHS | SIDE, subject.tested(data)


class LateError(Exception):
    """A job has taken too long."""


class Stages:
    """Steps by stage, from what a run tells of its progress: when the first and the last ended, their numbers, and how many there
    are in all. Raises `LateError` once it is told of a step after `end`."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.told: dict[str, tuple[float, int, float, int, int]] = {}

    def __call__(self, stage: str, done: int, total: int, _: float) -> None:
        now = time.perf_counter()
        began, first, *_ = self.told.get(stage, (now, done))
        self.told[stage] = began, first, now, done, total
        if now > self.end:
            raise LateError(stage)

    def a_step(self) -> dict[str, float]:
        """Seconds of a step of each stage that has more than one."""
        steps = {stage: (last - began, done - first) for stage, (began, first, last, done, _) in self.told.items()}
        return {stage: spent / count for stage, (spent, count) in steps.items() if count}

    def milliseconds(self) -> dict[str, float]:
        """The same as it is written down."""
        return {stage: round(1000 * value, 3) for stage, value in self.a_step().items()}

    def longer(self, times: dict[str, float]) -> dict[str, float]:
        """Seconds of each stage with so many times its steps."""
        return {stage: each * self.told[stage][-1] * times.get(stage, 1.0) for stage, each in self.a_step().items()}


def measure(data: Path, job: Job, place: torch.device, cap: float, *, small: bool) -> dict[str, Any]:
    """A job within `cap` seconds, and its file's worth."""
    model, stated, images = source(data, job.model)
    given = [f"{stage}.{name}={value}" for stage, options in job.stages.items() for name, value in options.items()]
    began = time.perf_counter()
    end = math.inf if small or job.whole else began + LATE * cap

    def run(settings: list[str], path: Path, told: Stages) -> dreamquant.Result:
        return dreamquant.run(
            model,
            path,
            recipe=job.recipe,
            bits=job.bits,
            plan=load_recipe(job.recipe).quantization.plan,
            budget="quick" if small else job.budget,
            settings=[*given, *settings],
            estimate=False,
            progress=told,
            device=place,
            **stated,
        )

    row = {"model": job.model, "recipe": job.recipe, "bits": job.bits, "budget": "small" if small else job.budget}
    part, whole = 1.0, dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        network = dreamquant.load(model, **stated, device=CPU)
        recipe = resolve(
            load_recipe(job.recipe),
            *_kind(network),
            budget="quick" if small else job.budget,
            bits=job.bits,
            plan=load_recipe(job.recipe).quantization.plan,
            settings=given,
        )
        full = {stage: lengths(stage, getattr(recipe, stage)) for stage in dict.fromkeys(STAGES.values())}
        least = {name: value // 5 if small and "steps" in name else value for name, value in FEW.items()}
        few = {stage: {name: min(least[name], value) for name, value in found.items()} for stage, found in full.items()}
        count = min(16 if small else TRIED, recipe.synthesis.count)
        settings = [*said(few), f"synthesis.count={count}", "synthesis.held_out=4"]
        settings += ["training.warm_up=1", "training.range_epochs=1"] if few["training"] else []
        told = Stages(end)
        try:
            if not small and not job.whole and any(full.values()):
                run(settings, path, told)
                times = {
                    label: math.prod(full[stage].values()) / math.prod(few[stage].values()) for label, stage in STAGES.items()
                }
                times[DREAMING] *= recipe.synthesis.count / count
                whole = told.longer(times)
                left = SPARE * (cap - 2 * (time.perf_counter() - began))  # what is no step is done once more
                part = max(0.0, min(1.0, left / max(sum(whole.values()), 1e-9)))
            if not small:
                shorter = said({stage: shortened(found, part) for stage, found in full.items()})
                settings = [] if part == 1 else shorter + milestones(recipe, part)
            told, started = Stages(end), time.perf_counter()
            result = run(settings, path, told)
        except LateError as stage:
            return row | {"part": part, "seconds_of_all": whole, "stopped": str(stage), "step_ms": told.milliseconds()}
        seconds = time.perf_counter() - started
        tested = images.spread(200) if small else images
        normal = {"mean": network.mean, "std": network.std, "input_shape": network.input_shape}
        found = evaluate(onnx_runner(path), tested, **normal, batch=50)
    return row | {
        "part": round(part, 4),
        "seconds_of_all": {stage: round(value, 1) for stage, value in whole.items()},
        "top1": found.top1,
        "test_images": found.images,
        "wall_seconds": round(seconds, 1),
        "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
        "step_ms": told.milliseconds(),
        "settings": [*given, *settings],
        "agreement_of_file": result.artifact.verification.top1_agreement,
        "threads": torch.get_num_threads(),
    }


def lengths(stage: str, chosen: Any) -> dict[str, int]:
    """Of a recipe's stage, the options that say how many steps it has."""
    if chosen is None:
        return {}
    known = find_method(stage, chosen.method).options
    given = {name: parameter.default for name, parameter in known.items()} | chosen.options
    return {name: given[name] for name in FEW if name in given}


def shortened(full: dict[str, int], part: float) -> dict[str, int]:
    """So many of the steps, at least a few; an epoch keeps its iterations."""
    least = {"steps": 50, "activation_steps": 50, "epochs": 8}
    return {name: max(min(least[name], value), round(part * value)) for name, value in full.items() if name in least}


def milestones(recipe: Recipe, part: float) -> list[str]:
    """The epochs at which learning rates fall, moved as far as training was shortened."""
    if recipe.training is None:
        return []
    known = find_method("training", recipe.training.method).options["milestones"].default
    marks = str(recipe.training.options.get("milestones", known)).split(",")
    return ["training.milestones=" + ",".join(str(max(1, round(part * int(mark)))) for mark in marks)]


def said(stages: dict[str, dict[str, int]]) -> list[str]:
    """Options as settings of a recipe."""
    return [f"{stage}.{name}={value}" for stage, found in stages.items() for name, value in found.items()]


@plain_torch()
def apart(device: torch.device) -> float:
    """The largest difference between the answers of the float digits network here and there, over the largest answer."""
    network = dreamquant.load(DIGITS / "digits.pt2", device=CPU)
    images = dreamquant.synthesize(network, 64, method="fractal").images
    home, there = network(images), network.to(device)(images).cpu()
    return ((home - there).abs().max() / home.abs().max()).item()


if __name__ == "__main__":
    main()
