"""Kill runs at random moments, let them go on, and see whether they end with the same bits.

    python -m benchmarks.kill MODEL --mean a,b,c --std a,b,c [--times 20] [--seed 0]

Two kinds of run take turns: W4A4 by `auto`, whose time goes into reconstruction, and W4A4 by `dsg_qat` with a reconstruction
before it, whose time goes into training. Each first runs undisturbed. Then one is killed (SIGKILL) at a moment drawn by the
seed, some milliseconds after some step of some stage, and started once more on the same run folder. Prints a table; the exit
status is 1 where a file has other bits than the undisturbed run's, or where less than three fifths of the kills fell into
reconstruction and training.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LEARNING = ("reconstructing", "training")
LEARNING_SHARE = 0.6
FEW = ["synthesis.count=16", "synthesis.held_out=8", "synthesis.steps=10", "reconstruction.batch=8"]
TRAINING = ["epochs=10", "iterations=4", "batch=8", "warm_up=2", "range_epochs=3", "width=16"]
KINDS = {
    "auto": [*FEW, "reconstruction.steps=60"],
    "dsg_qat": [*FEW, "reconstruction.method=qdrop", "reconstruction.steps=10", *(f"training.{one}" for one in TRAINING)],
}


class Step(NamedTuple):
    """A step of a stage that a run has told of."""

    stage: str
    done: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--mean", default="")
    parser.add_argument("--std", default="")
    parser.add_argument("--times", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "OUTPUT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        work(given.model, given.mean, given.std, *given.child)
    else:
        sys.exit(campaign(given.model, given.mean, given.std, given.times, given.seed))


def work(model: str, mean: str, std: str, kind: str, output: str, folder: str) -> None:
    """One run, which tells its steps on standard output."""
    from dreamquant.flow import run
    from dreamquant.network.input_space import parse_numbers

    run(
        model,
        output,
        recipe=kind,
        bits="W4A4",
        settings=KINDS[kind],
        mean=parse_numbers(mean) or None,
        std=parse_numbers(std) or None,
        run_dir=folder,
        estimate=False,
        progress=lambda stage, done, *_: print(f"{stage}\t{done}", flush=True),
    )


def campaign(model: str, mean: str, std: str, times: int, seed: int) -> int:
    """The table; 0 where all is well, else 1."""
    draw = random.Random(seed)
    command = [sys.executable, "-m", "benchmarks.kill", model, f"--mean={mean}", f"--std={std}"]
    with tempfile.TemporaryDirectory(prefix="kill-") as place:
        folder = Path(place)
        whole: dict[str, tuple[str, list[Step]]] = {}
        for kind in KINDS:
            began = time.perf_counter()
            steps = _run(command, kind, folder / f"{kind}.onnx", folder / kind, None, 0.0)
            whole[kind] = (_hash(folder / f"{kind}.onnx"), steps)
            print(f"{kind}: {time.perf_counter() - began:.0f} s, sha256 {whole[kind][0][:16]}", flush=True)
        print("\n| recipe | killed while | step | ms after it | same bits |\n|---|---|---:|---:|---|", flush=True)
        same = learning = 0
        for number in range(times):
            kind = list(KINDS)[number % len(KINDS)]
            expected, steps = whole[kind]
            moment, delay = draw.choice(_moments(steps, draw)), draw.random() / 4
            output, kept = folder / f"{number}.onnx", folder / f"run-{number}"
            told = _run(command, kind, output, kept, moment, delay)
            assert not output.exists(), "the run was over before it was killed"
            _run(command, kind, output, kept, None, 0.0)
            equal = _hash(output) == expected
            same, learning = same + equal, learning + (told[-1].stage in LEARNING)
            left = f"{told[-1].stage} | {told[-1].done} | {1000 * delay:.0f}"
            print(f"| {kind} | {left} | {'yes' if equal else 'NO'} |", flush=True)
    print(f"\n{same} of {times} with the same bits; {learning} were killed in reconstruction or training")
    return 0 if same == times and learning >= LEARNING_SHARE * times else 1


def _moments(steps: list[Step], draw: random.Random) -> list[Step]:
    """Steps to choose from: three times in four those of reconstruction and training, but for the last, before the output."""
    learning = [step for step in steps[:-1] if step.stage in LEARNING]
    return learning if draw.random() < 0.75 else [step for step in steps if step.stage not in LEARNING]


def _run(command: list[str], kind: str, output: Path, folder: Path, until: Step | None, delay: float) -> list[Step]:
    """Run to the end, or kill some time after a step; the steps that it told of."""
    steps = []
    with subprocess.Popen([*command, "--child", kind, str(output), str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            stage, _, done = line.rstrip("\n").partition("\t")
            steps.append(Step(stage, int(done)))
            if steps[-1] == until:
                time.sleep(delay)
                process.kill()
    if until is None and process.returncode:
        raise SystemExit(f"a run ended with status {process.returncode}")
    return steps


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
