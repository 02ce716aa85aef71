"""Every network at hand, quantized to W8A8 by the default recipe and by other tools, on the same images in one process.

    python -m benchmarks.zoo --data DATA [--only NETWORK,...] [--methods ours,...] [--again]
    python -m benchmarks.zoo --data DATA --only yolox_nano --label mse --settings quantization.changes.activation_ranges=mse
    python -m benchmarks.zoo --table

A row is one network (`benchmarks.networks`) and one method: what its answers are worth in ONNX Runtime, how far they are from
the float network's (`distance`, that of the outputs' own kinds, summed), its size, and the processor seconds and the most memory
that making it took, in a process of its own. A row that is there is not measured again without --again; the last counts.

With --count there are fewer images to test on, and with --settings another recipe is run: such rows go to `runs/zoo.jsonl` and
stay out of the table, and so does what --results names. Files are kept in `runs/zoo`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import dreamquant  # isort: skip  # before torch
import torch
from torch import Tensor

from benchmarks.networks import SUBJECTS, Answers, Subject
from benchmarks.run import RESULTS, circumstances
from dreamquant.assess.assess import float_file
from dreamquant.network.answers import distances
from dreamquant.network.graph import Network
from dreamquant.network.scores import file_answers
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples
from dreamquant.storage import save_samples

FILES, LOOKS, PLACE = Path("runs/zoo"), Path("runs/zoo.jsonl"), RESULTS / "zoo.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a method is given, in a process of its own: a network by name, and the file that it shall write.

    `real` is a file of real images, as the network is fed them.
    """

    network: str
    data: Path
    output: Path
    real: Path
    settings: tuple[str, ...] = ()
    seed: int = 0


def ours(job: Job, *, images: bool = False) -> Row:
    """The default recipe; what it says of its file."""
    subject = NAMED[job.network]
    result = dreamquant.run(
        subject.model(job.data),
        job.output,
        settings=job.settings,
        seed=job.seed,
        images=job.real if images else None,
        **subject.stated,
    )
    trust = result.assessment.trust
    return {
        "told": {"agreement": result.assessment.agreement.top1, "lost": None if trust is None else trust.drop},
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
    }


def ours_images(job: Job) -> Row:
    """The same on real images, a quarter of which it holds out."""
    return ours(job, images=True)


METHODS: dict[str, Callable[[Job], Row]] = {"ours": ours, "ours-images": ours_images}
NAMED = {subject.name: subject for subject in SUBJECTS}


@dataclass
class Tested:
    """A network with what its float file answers to the images that test it."""

    subject: Subject
    data: Path
    count: int | None
    labels: Tensor = field(init=False)

    @cached_property
    def network(self) -> Network:
        return self.subject.load(self.data)

    @cached_property
    def file(self) -> Path:
        return float_file(self.network, self.folder)

    @property
    def folder(self) -> Path:
        place = FILES / self.subject.name
        place.mkdir(parents=True, exist_ok=True)
        return place

    @cached_property
    def real(self) -> Path:
        """The real images that calibrate, as the network is fed them, in a file."""
        place = self.folder / "real.safetensors"
        if not place.exists():
            save_samples(Samples(self.subject.calibration(self.data, self.network), method="real"), place)
        return place

    @cached_property
    def expected(self) -> list[Tensor]:
        return self.answers(self.file)

    def answers(self, file: Path) -> list[Tensor]:
        """All outputs of a file, (N, ...), on the images that test it; the labels are kept."""
        runner = onnx_runner(file, threads=1, layout=self.network.space.layout)
        found, labels = [], []
        for images, told in self.subject.batches(self.data, self.network, self.count):
            found.append(file_answers(self.network, runner, images))
            labels.append(told)
        self.labels = torch.cat(labels)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def measured(self, file: Path) -> Row:
        """What a file is worth."""
        expected = self.expected
        actual = expected if file == self.file else self.answers(file)
        worth = self.subject.worth(Answers(self.network, expected, actual, self.labels))
        metric, *beside = worth.items()
        return {
            "metric": metric[0],
            "value": metric[1],
            "beside": dict(beside),
            "distance": distances(self.network.outputs, expected, actual),
            "test_images": len(self.labels),
            "bytes": file.stat().st_size,
            "float_bytes": self.file.stat().st_size,
        }


def made(method: str, job: Job) -> Row:
    """A method's file, made in a process of its own, and what making it took; or why there is none."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_made, method, job).result()
        except BrokenProcessPool:
            return {"failed": "the process died"}


def _made(method: str, job: Job) -> Row:
    torch.set_num_threads(1)
    wall, processor = time.perf_counter(), time.process_time()
    try:
        said = METHODS[method](job)
    except dreamquant.DreamQuantError as error:
        return {"refused": str(error)}
    except Exception as error:  # a tool's own; it is the row's result
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    taken = {"processor_seconds": time.process_time() - processor, "wall_seconds": time.perf_counter() - wall}
    return {**{name: round(value, 1) for name, value in taken.items()}, "peak_mb": peak_mb(), **said}


def peak_mb() -> int:
    """The most memory that this process has had, by the system's own count, which `getrusage` begins at its parent's."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


def measure(tested: Tested, method: str, given: argparse.Namespace) -> Row:
    """One row but for its names."""
    if method == "float":
        return tested.measured(tested.file)
    output = tested.folder / f"{method}{f'.{given.label}' if given.label else ''}.onnx"
    job = Job(tested.subject.name, given.data, output, tested.real, tuple(given.settings), given.seed)
    said = made(method, job)
    return said if "refused" in said or "failed" in said else said | tested.measured(output)


def rows_of(place: Path) -> list[Row]:
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("network", "method", "label", "seed", "count"))


def wanted(given: argparse.Namespace) -> Iterator[tuple[Subject, str]]:
    for subject in SUBJECTS:
        for method in given.methods:
            if not given.only or subject.name in given.only:
                yield subject, method


def said(row: Row) -> str:
    """A row in one line."""
    names = f"{row['network']:20} {row['method'] + (' ' + row['label'] if row['label'] else ''):16}"
    why = row.get("refused") or row.get("failed")
    if why:
        return f"{names} {'refused' if 'refused' in row else 'failed'}: {why}"
    beside = "".join(f", {name} {value:.2f}" for name, value in row["beside"].items())
    cost = f", {row['processor_seconds']:.0f} s, {row['peak_mb']} MB" if "peak_mb" in row else ""
    return (
        f"{names} {row['metric']} {row['value']:.2f}{beside}, distance {row['distance']:.4f}, {row['bytes'] / 1e3:.0f} kB{cost}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--only", type=names_of(list(NAMED)), default=[], metavar="NETWORK,...", help=f"of {', '.join(NAMED)}")
    every = ["float", *METHODS]
    parser.add_argument("--methods", type=names_of(every), default=every, metavar="METHOD,...", help=f"of {', '.join(every)}")
    parser.add_argument("--count", type=int, help="images to test on, at even distances")
    parser.add_argument("--settings", nargs="+", default=[], metavar="STAGE.OPTION=VALUE", help="of the recipe, for ours")
    parser.add_argument("--label", default=None, help="what a variant is called; by default its settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="where rows are appended")
    parser.add_argument("--again", action="store_true", help="measure rows that are there once more")
    given = parser.parse_args()
    given.label = " ".join(given.settings) if given.label is None else given.label
    place = given.results or (LOOKS if given.count or given.settings or given.label else PLACE)
    torch.set_num_threads(1)
    done = {key(row): row for row in rows_of(place)}
    tested: Tested | None = None
    for subject, method in wanted(given):
        label = given.label if method.startswith("ours") else ""
        names = {"network": subject.name, "method": method, "label": label, "seed": given.seed, "count": given.count}
        if key(names) in done and not given.again:
            print(said(done[key(names)]), "(measured before)", flush=True)
            continue
        if tested is None or tested.subject is not subject:
            tested = Tested(subject, given.data, given.count)
        row = names | measure(tested, method, given) | {"settings": given.settings} | circumstances()
        print(said(row), flush=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a") as file:
            file.write(json.dumps(row) + "\n")


def names_of(known: list[str]) -> Callable[[str], list[str]]:
    """Reads names between commas, each of which is known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(known)}")
        return names

    return read


if __name__ == "__main__":
    main()
