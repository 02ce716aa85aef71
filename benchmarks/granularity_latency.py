"""How much time one grid a weight saves against one a channel: all-tensor, hybrid and all-channel files, in turns.

    python -m benchmarks.granularity_latency --data DATA [--models resnet20 ...] [--rounds 60]

The three W8A8 files of a model (plan deploy) are run one after the other in each round, in ONNX Runtime and, where it is
installed, in OpenVINO, on one thread and batch 1. A row is a model, a runtime and a file: median milliseconds, and the median and
quartiles over the rounds of the all-channel file's time divided by its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import dreamquant
from benchmarks.models import network
from benchmarks.run import RESULTS, commit, granularities, images_of
from benchmarks.suites import DREAMER, TENSOR, Case
from dreamquant.allocation import allocate
from dreamquant.assess.latency import processor_name
from dreamquant.quantization.plan import load_plan
from dreamquant.runtime import onnx_runner

FILES = {
    "tensor": (TENSOR, {"method": "uniform"}),
    "hybrid": ({}, {"method": "hybrid", "mode": "latency"}),
    "channel": ({}, {"method": "uniform"}),
}
SAMPLE_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(DREAMER), choices=DREAMER)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            files, counts = exported(given.data, name, Path(folder))
            shape = (1, *network(given.data, name).input_shape)
            image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            for runtime, load in runtimes():
                runs = {kind: load(path, image) for kind, path in files.items()}
                times = timed(runs, given.rounds)
                for kind in files:
                    ratio = np.percentile(times["channel"] / times[kind], (25, 50, 75))
                    row = {
                        "model": name,
                        "runtime": runtime,
                        "file": kind,
                        **counts[kind],
                        "bytes": files[kind].stat().st_size,
                        "ms": round(1000 * float(np.median(times[kind])), 4),
                        "speed_against_channel": round(float(ratio[1]), 4),
                        "quartiles": [round(float(ratio[0]), 4), round(float(ratio[2]), 4)],
                        "rounds": given.rounds,
                        "processor": f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}",
                        "commit": commit(),
                    }
                    print(json.dumps(row), flush=True)
                    with (RESULTS / "granularity_latency.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")


def exported(data: Path, name: str, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, object]]]:
    """The three files of a model, and how many of their layers are per channel."""
    model, files, counts = network(data, name), {}, {}
    for kind, (changes, allocation) in FILES.items():
        samples, _ = images_of(data, Case(name, kind, "W8A8", DREAMER[name]), seed=0)
        plan = allocate(model, samples, load_plan("deploy", **changes), bits="W8A8", **allocation).plan
        student = dreamquant.quantize(model, samples, bits="W8A8", plan=plan)
        files[kind], counts[kind] = folder / f"{kind}.onnx", granularities(student)
        dreamquant.export(student, files[kind], samples)
    return files, counts


def runtimes() -> Iterator[tuple[str, Callable[[Path, np.ndarray], Callable[[], object]]]]:
    """Each runtime's name and version, and a function (file, image) -> a function that runs the file once."""
    yield f"onnxruntime {version('onnxruntime')}", lambda path, image: partial(onnx_runner(path, threads=1), image)
    if find_spec("openvino"):
        import openvino

        def load(path: Path, image: np.ndarray) -> Callable[[], object]:
            request = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1}).create_infer_request()
            return lambda: request.infer([image])

        yield f"openvino {openvino.__version__}", load


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of one run, (rounds,) a file; each round runs all files in turns."""
    repeats = {}
    for kind, run in runs.items():
        fastest = min(seconds(run, 1) for _ in range(10))
        repeats[kind] = max(1, round(SAMPLE_SECONDS / fastest))
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds):
        order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]  # each file is first as often as another
        for kind in order:
            runs[kind]()
            found[kind].append(seconds(runs[kind], repeats[kind]))
    return {kind: np.array(values) for kind, values in found.items()}


def seconds(run: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
