"""Every network at hand, quantized to W8A8 by the default recipe and by other tools, on the same images in one process.

    python -m benchmarks.zoo --data DATA [--only NETWORK,...] [--methods ours,...] [--again]
    python -m benchmarks.zoo --data DATA --only yolox_nano --label mse --settings quantization.changes.activation_ranges=mse
    python -m benchmarks.zoo --table [worth|distance|cost]

A row is one network (`benchmarks.networks`) and one method: what its answers are worth in ONNX Runtime, how far they are from
the float network's (`distance`, that of the outputs' own kinds, summed), its size, and the processor seconds and the most memory
that making it took, in a process of its own. The method `latency` times the files that are there in turns, in one run. A row
that is there is not measured again without --again; the last counts.

With --count there are fewer images to test on, and with --settings another recipe is run: such rows go to `runs/zoo.jsonl` and
stay out of the table, and so does what --results names. Files are kept in `runs/zoo`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import dreamquant  # isort: skip  # before torch
import numpy as np
import torch
from onnxruntime.quantization import CalibrationMethod
from torch import Tensor

from benchmarks.networks import SUBJECTS, Answers, Subject
from benchmarks.other_tools import nncf_quantize, onnxruntime_static, prepared_for_tools
from benchmarks.run import RESULTS, circumstances
from benchmarks.zoo_tables import TABLES, tables
from dreamquant.assess.assess import float_file
from dreamquant.assess.latency import times_in_turns
from dreamquant.network.answers import distances
from dreamquant.network.graph import Network
from dreamquant.network.scores import file_answers
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples
from dreamquant.storage import read_samples, save_samples

FILES, LOOKS, PLACE = Path("runs/zoo"), Path("runs/zoo.jsonl"), RESULTS / "zoo.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a method is given, in a process of its own: a network by name, and the file that it shall write.

    `float_file` is the network as ONNX, and `real` a file of real images, as the network is fed them.
    """

    network: str
    data: Path
    output: Path
    float_file: Path
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


def other(job: Job, *, tool: Callable[[Path, Path, Samples, str], None], noise: bool) -> Row:
    """Another tool, on the real images or on as many of independent pixels with the mean and deviation of the input space."""
    network = NAMED[job.network].load(job.data)
    samples = read_samples(job.real)
    if noise:
        samples = dreamquant.synthesize(network, len(samples), method="noise", seed=job.seed)
    if network.space.layout == "NHWC":
        samples = Samples(samples.images.permute(0, 2, 3, 1))
    source = prepared_for_tools(job.float_file, job.output.with_name("given.onnx"), (1, *samples.images.shape[1:]))
    tool(source, job.output, samples, onnx_runner(source).input_name)
    return {"images": len(samples)}


TOOLS = {
    "ort-minmax": onnxruntime_static,
    "ort-percentile": partial(onnxruntime_static, ranges=CalibrationMethod.Percentile),
    "ort-entropy": partial(onnxruntime_static, ranges=CalibrationMethod.Entropy),
    "nncf": nncf_quantize,
}
METHODS: dict[str, Callable[[Job], Row]] = {
    "ours": ours,
    "ours-images": ours_images,
    **{name: partial(other, tool=tool, noise=False) for name, tool in TOOLS.items()},
    **{f"{name}-noise": partial(other, tool=tool, noise=True) for name, tool in TOOLS.items()},
}
ROUNDS = 40  # of timing
TIMED = ("ours", "ours-images", "ort-minmax", "nncf")  # ranges change no time, but for ours, which may change grids
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

    def place(self, method: str, label: str) -> Path:
        """Where a method's file lies."""
        return self.folder / f"{method}{f'.{label}' if label and is_ours(method) else ''}.onnx"

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
        worth = self.subject.worth(Answers(self.data, file, self.network, expected, actual, self.labels))
        metric, *beside = worth.items()
        return {
            "metric": metric[0],
            "value": metric[1],
            "beside": dict(beside),
            "distance": distances(self.network.outputs, expected, actual),
            "test_images": len(self.labels),
            "bytes": file.stat().st_size,
            "sha": sha(file),
            "float_bytes": self.file.stat().st_size,
        }


def is_ours(method: str) -> bool:
    """Whether settings are for it."""
    return method in ("ours", "ours-images")


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
    if method == "latency":
        return latency(tested, given.label)
    output = tested.place(method, given.label)
    job = Job(tested.subject.name, given.data, output, tested.file, tested.real, tuple(given.settings), given.seed)
    said = made(method, job)
    if "refused" in said or "failed" in said:
        return said
    try:
        return said | tested.measured(output)
    except dreamquant.DreamQuantError as error:  # the runtime's, of a tool's file
        return said | {"failed": str(error)}


def latency(tested: Tested, label: str) -> Row:
    """Times of the files that lie there, in turns; of ours, those of the label. `speed` is float's time over a file's: the lower
    quartile, median and upper quartile of the rounds."""
    files = {"float": tested.file} | {name: tested.place(name, label) for name in TIMED}
    files = {name: file for name, file in files.items() if file.exists()}
    network = tested.network
    times = times_in_turns(
        list(files.values()),
        input_shape=network.input_shape,
        batch=network.batch or 1,
        rounds=ROUNDS,
        layout=network.space.layout,
    )
    ratios = np.percentile(times[:, :1] / times, (25, 50, 75), axis=0)
    told = zip(files, np.median(times, axis=0), ratios.T.round(3).tolist(), strict=True)
    return {"times": {name: {"ms": 1000 * float(ms), "speed": speed, "sha": sha(files[name])} for name, ms, speed in told}}


def sha(file: Path) -> str:
    """A short text that tells files apart."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


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
    if "times" in row:
        return f"{names} " + ", ".join(f"{name} {one['ms']:.2f} ms" for name, one in row["times"].items())
    beside = "".join(f", {name} {value:.2f}" for name, value in row["beside"].items())
    cost = f", {row['processor_seconds']:.0f} s, {row['peak_mb']} MB" if "peak_mb" in row else ""
    return (
        f"{names} {row['metric']} {row['value']:.2f}{beside}, distance {row['distance']:.4f}, {row['bytes'] / 1e3:.0f} kB{cost}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the data folder")
    parser.add_argument("--table", nargs="?", const="worth", choices=TABLES, help="print rows as Markdown, and measure nothing")
    parser.add_argument("--only", type=names_of(list(NAMED)), default=[], metavar="NETWORK,...", help=f"of {', '.join(NAMED)}")
    every = ["float", *METHODS, "latency"]
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
    if given.table:
        print(tables(rows_of(place), [given.table]))
        return
    if given.data is None:
        parser.error("--data is needed: the folder of models and images")
    torch.set_num_threads(1)
    done = {key(row): row for row in rows_of(place)}
    tested: Tested | None = None
    for subject, method in wanted(given):
        label = given.label if is_ours(method) or method == "latency" else ""
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
