"""How long two ONNX files take, measured side by side in the runtime that they are for."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from dreamquant.errors import OptionError
from dreamquant.limits import check_memory
from dreamquant.runtime import OnnxRunner, onnx_runner, refusals

_SAMPLE_SECONDS = 0.005
MOST_ROUNDS = 10_000
_WARM_UP_SECONDS = 0.05


@dataclass(frozen=True)
class Latency:
    """Time per batch of two files, `a` and `b`, in ONNX Runtime on one machine.

    `a_ms` and `b_ms` are median milliseconds of one run on a batch of `batch` images. `ratio` is the median over the
    rounds of a's time divided by b's (above 1: b is the faster), `ratio_low` and `ratio_high` its quartiles: half of
    the rounds lie between them. `threads` is the number inside one operator, `runtime` its name and version.
    """

    a_ms: float
    b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    batch: int
    threads: int
    rounds: int
    runtime: str
    processor: str


def compare_latency(
    a: Path,
    b: Path,
    *,
    input_shape: tuple[int, int, int],
    batch: int = 1,
    threads: int = 1,
    rounds: int = 20,
    seed: int = 0,
    layout: str | None = None,
) -> Latency:
    """Time of the ONNX files `a` and `b` on normal noise (batch, C, H, W), in one process and in turns: a, b, a, b, ...

    `ratio` is of the two times of one round, so it is steadier than they are. `layout` is how the files take images, where they
    do not tell. Raises what `times_in_turns` does.
    """
    times = times_in_turns((a, b), input_shape=input_shape, batch=batch, threads=threads, rounds=rounds, seed=seed, layout=layout)
    ratio_low, ratio, ratio_high = np.percentile(times[:, 0] / times[:, 1], (25, 50, 75)).tolist()
    a_ms, b_ms = (1000 * np.median(times, axis=0)).tolist()
    runtime = f"onnxruntime {onnxruntime.__version__}"
    return Latency(a_ms, b_ms, ratio, ratio_low, ratio_high, batch, threads, rounds, runtime, processor_name())


def times_in_turns(
    paths: Sequence[Path],
    *,
    input_shape: tuple[int, int, int],
    batch: int = 1,
    threads: int = 1,
    rounds: int = 20,
    seed: int = 0,
    layout: str | None = None,
) -> NDArray[np.float64]:
    """Seconds (rounds, files) of a run of each ONNX file on normal noise (batch, C, H, W), in one process and in turns.

    After a warm-up each of the `rounds` takes one sample of each file: as many runs as last about 5 ms, after one that does not
    count. What the machine does meanwhile meets all files. Raises OptionError for an impossible `batch`, `threads` or `rounds`,
    or a `batch` that a file does not take; ModelError for files that the runtime refuses.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise OptionError(f"{name} is {value}, it must be at least 1")
    if rounds > MOST_ROUNDS:
        raise OptionError(f"rounds is {rounds:.6g}; quartiles are told from {MOST_ROUNDS:,} at the most")
    check_memory(4 * batch * math.prod(input_shape), f"a batch of {batch} images {tuple(input_shape)}", OptionError)
    images = np.random.default_rng(seed).standard_normal((batch, *input_shape), dtype=np.float32)
    samplers = [_sampler(onnx_runner(path, threads=threads, layout=layout), images) for path in paths]
    return np.array([[sample() for sample in samplers] for _ in range(rounds)])


def processor_name() -> str:
    """The processor's name as the system gives it, its architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _sampler(runner: OnnxRunner, images: NDArray[np.float32]) -> Callable[[], float]:
    """A function that takes one sample: seconds per run, over a number of runs found in the warm-up."""
    if runner.batch not in (None, len(images)):
        raise OptionError(f"{runner.name} takes batches of {runner.batch} only, not of {len(images)}")
    run = partial(runner.session.run, [runner.output_name], {runner.input_name: runner.fed(images)})
    with refusals(f"{runner.name} does not run on noise of shape {images.shape}"):
        run()
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _WARM_UP_SECONDS:
        fastest = min(fastest, _seconds(run, 1))
    repeats = math.ceil(_SAMPLE_SECONDS / fastest)

    def sample() -> float:
        run()  # brings this file's weights back into the caches, and sees the other's threads asleep
        return _seconds(run, repeats)

    return sample


def _seconds(run: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats
