"""Two ONNX files of any tool side by side in ONNX Runtime: size, layers, speed, how near their outputs are, and accuracy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dreamquant.assess.contents import Contents, contents
from dreamquant.assess.labelled import LabelledImages
from dreamquant.assess.latency import Latency, compare_latency
from dreamquant.assess.paired import Array, OutputError, PairedAccuracy, PairedWorth, Ranks, Tally, Worths
from dreamquant.devices import CPU
from dreamquant.errors import DataError, DreamQuantError, ModelError, OptionError
from dreamquant.network.graph import Network, Source
from dreamquant.network.input_space import InputSpace, Statement, format_numbers, of_properties, standard, stated
from dreamquant.network.load import load
from dreamquant.network.output_properties import names_of
from dreamquant.network.output_properties import of_properties as of_stored
from dreamquant.network.outputs import CLASSES, FEATURES, restated
from dreamquant.network.outputs import Output as KindOfOutput
from dreamquant.plain import plain_torch
from dreamquant.runtime import OnnxRunner, Output, onnx_runner
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

COUNT, CHUNK = 64, 32  # procedural images where no others are given; images at once where both files take any number
_NUMBERS = {"bool", "double", "float", "float16"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}

Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]  # images and labels; -1 where nobody has told them


@dataclass(frozen=True)
class Comparison:
    """The ONNX files `a` and `b`, measured against each other.

    `size_ratio` is b's bytes divided by a's. `latency` is None where the files take no batch of one size. `outputs`, in the
    order of a's, were compared on `count` images, which `images` describes, and matched by `matched`: name or order.
    `accuracy` is None without labels of classes or without an output of class scores; `worth` is what both files are by labels
    of all other kinds. `notes` are sentences on what else to know.
    """

    a: Contents
    b: Contents
    size_ratio: float
    latency: Latency | None
    images: str
    count: int
    matched: str
    outputs: list[OutputError]
    accuracy: PairedAccuracy | None
    worth: PairedWorth | None
    notes: list[str]


@plain_torch()
def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    samples: Samples | None = None,
    data: LabelledImages | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: str | None = None,
    layout: str | None = None,
    channels: str | None = None,
    outputs: Mapping[str, str] | None = None,
    blank: int | None = None,
    count: int = COUNT,
    batch: int | None = None,
    threads: int = 1,
    rounds: int = 20,
    seed: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two ONNX files; outputs on `samples`, else on `data`, else on `count` procedural images of `seed`.

    Where there are both, accuracy is that on `data`. `input_shape` is (C, H, W), for what both files leave open. `mean` and
    `std`, `pixels` and `channels` state what both files are fed, as in `load`, and `layout` how they take it; what the files
    store is used where nothing is stated. `outputs` states kinds of outputs, by a's names (`network.outputs`); the others' are
    found in the first file that tells them or can be read; `blank` is as in `judge`. Latency is of `batch` images, where it is
    None of 1 or what the files take;
    `threads` is the number inside one operator, here and there: idle threads of one file would keep the other waiting.
    `callback` hears (images done, images in all).

    Raises ModelError for files that the runtime refuses, whose inputs or outputs do not fit each other, or whose outputs are
    not finite numbers; DataError for images or labels that do not fit the files; OptionError for impossible options.
    """
    a, b = Path(a), Path(b)
    statement = Statement(tuple(mean or ()) or None, tuple(std or ()) or None, pixels, layout, channels)
    first, second = (onnx_runner(path, threads=threads, layout=layout) for path in (a, b))
    files = _files(first, second, input_shape, samples)
    known, unknown_kinds = _kinds(files, (a, b), outputs or {})
    kinds = {output.name: output for output in known if output.certain}
    inner = [output.name for output in known]
    if not set(inner) <= set(first.outputs):  # sizes of the outputs depend on values
        opened = [runner.looked_into(inner, threads=threads) for runner in (first, second)]
        if any(list(runner.outputs) != inner for runner in opened):
            raise ModelError(f"the outputs have sizes that depend on values, and {b} has no {', '.join(inner)} for them")
        first, second = opened
        files = _files(first, second, input_shape, samples)
        unknown_kinds = [f"the outputs have sizes that depend on values: compared is what is read for them, {', '.join(inner)}"]
    space = InputSpace() if samples is not None and data is None else _space(files, statement)
    real = None if data is None else _real(files, data, space)
    if samples is not None:
        samples.check(files.input_shape)
    images = _given(files, samples) if samples is not None else real or _procedural(files, space, count, seed)
    stored = contents(a), contents(b)
    latency, untimed = _latency(files, (a, b), batch, threads, rounds)
    tallies = _tallies(files, stored, kinds)
    ranks, worth = None, None
    if data is not None and (data.truths is not None or (data.labels.min() >= 0 and _are_features(kinds))):
        worth = Worths(data, [kinds.get(one) for one, _ in files.pairs], files.input_shape, first.name, blank)
    elif data is not None and data.labels.min() >= 0:
        ranks = Ranks(int(data.labels.max()), tallies)
    judges = [judge for judge in (ranks, worth) if judge is not None]
    for done, values, labels in files.answers(images.batches):
        for tally, (one, other) in zip(tallies, values, strict=True):
            tally.add(one, other, len(labels))
        if images is real:
            for judge in judges:
                judge.add(values, labels)
        if callback is not None:
            callback(done, images.count)
    if judges and real is not None and images is not real:
        for _, values, labels in files.answers(real.batches):
            for judge in judges:
                judge.add(values, labels)
    return Comparison(
        a=stored[0],
        b=stored[1],
        size_ratio=stored[1].bytes / stored[0].bytes,
        latency=latency,
        images=images.text,
        count=images.count,
        matched=files.matched,
        outputs=[tally.result() for tally in tallies],
        accuracy=None if ranks is None else ranks.result(),
        worth=None if worth is None else worth.result(),
        notes=[*files.notes, *unknown_kinds, *images.notes, *untimed, *([] if worth else _unlabelled(data, ranks))],
    )


def _tallies(files: _Files, stored: tuple[Contents, Contents], kinds: Mapping[str, KindOfOutput]) -> list[Tally]:
    one, other = stored
    names = files.a.name, files.b.name
    return [Tally(names, (x, y), (x in one.probabilities, y in other.probabilities), kinds.get(x)) for x, y in files.pairs]


def _are_features(kinds: Mapping[str, KindOfOutput]) -> bool:
    """Whether labels of classes are held against features, for nothing else is there."""
    found = [output.kind for output in kinds.values()]
    return FEATURES in found and CLASSES not in found


def _kinds(files: _Files, paths: tuple[Path, Path], stated: Mapping[str, str]) -> tuple[tuple[KindOfOutput, ...], list[str]]:
    """What the outputs are, by a's names, from the first file that tells them or can be read; and notes on how that is known.

    Of a file whose outputs have sizes that depend on values, it is the inner values that those are made of.
    """
    reasons = []
    for place, path in enumerate(paths):
        runner = (files.a, files.b)[place]
        names = {pair[place]: pair[0] for pair in files.pairs}
        told = [] if stated else names_of(runner.metadata)
        stored = of_stored(runner.metadata, list(runner.looked_into(told).outputs)) if told else None
        if stored is not None:
            return tuple(replace(output, name=names.get(output.name, output.name)) for output in stored), []
        try:
            network = load(path, input_shape=files.input_shape, device=CPU)
        except DreamQuantError as error:
            reasons.append(str(error))
            continue
        found = tuple(replace(output, name=names.get(output.name, output.name)) for output in network.outputs)
        return restated(replace(network, outputs=found), stated), []
    if stated:
        raise OptionError(f"kinds of outputs are stated, and neither file can be read to hold them against it: {reasons[0]}")
    return (), ["neither file can be read, so outputs of classes are told by their shape"]


# ---- two files


@dataclass(frozen=True)
class _Files:
    """Two files that take the same images (C, H, W), and the pairs of their outputs, matched by name or by order."""

    a: OnnxRunner
    b: OnnxRunner
    input_shape: tuple[int, int, int]
    pairs: list[tuple[str, str]]
    matched: str

    @property
    def batches(self) -> set[int]:
        """The batch sizes that the files are bound to; empty where both take any."""
        return {runner.batch for runner in (self.a, self.b) if runner.batch is not None}

    @property
    def step(self) -> int:
        """How many images both are run on at once."""
        return math.lcm(*self.batches) if self.batches else CHUNK

    @property
    def notes(self) -> list[str]:
        if self.matched == "name":
            return []
        names = ", ".join(f"{one} with {other}" for one, other in self.pairs)
        return [f"the files name their outputs differently, so these were matched by order: {names}"]

    def answers(self, batches: Batches) -> Iterator[tuple[int, list[tuple[Array, Array]], NDArray[np.int64]]]:
        """For each batch how many images are done with it, the pairs of outputs, the images first, and its labels.

        Files bound to a batch size both get whole batches, the last filled up with copies of its first image.
        """
        ones, others = ([pair[place] for pair in self.pairs] for place in (0, 1))
        done = 0
        for images, labels in batches:
            size, surplus = len(images), -len(images) % self.step if self.batches else 0
            whole = np.concatenate([images, np.repeat(images[:1], surplus, axis=0)]) if surplus else images
            found = zip(self.a.run(whole, ones), self.b.run(whole, others), strict=True)
            done += size
            moved = [
                (np.moveaxis(one, self.a.axes[x], 0), np.moveaxis(other, self.b.axes[y], 0))
                if one.ndim == other.ndim
                else (one, other)
                for (x, y), (one, other) in zip(self.pairs, found, strict=True)
            ]
            yield done, [(_cut(one, len(whole), size), _cut(other, len(whole), size)) for one, other in moved], labels


def _cut(output: Array, filled: int, size: int) -> Array:
    return output[:size] if len(output) == filled else output


def _files(a: OnnxRunner, b: OnnxRunner, given: tuple[int, int, int] | None, samples: Samples | None) -> _Files:
    shape = _input_shape(a, b, given, samples)
    for runner in (a, b):
        for name, output in runner.outputs.items():
            if output.kind.removeprefix("tensor(").removesuffix(")") not in _NUMBERS:
                raise ModelError(f"{runner.name} gives {output.kind} as {name}, which is no tensor of numbers to compare")
    by_name = set(a.outputs) == set(b.outputs)
    pairs = [(name, name) for name in a.outputs] if by_name else list(zip(a.outputs, b.outputs, strict=False))
    fits = len(a.outputs) == len(b.outputs) and all(_fit(a, a.outputs[one], b, b.outputs[other]) for one, other in pairs)
    if not fits:
        raise ModelError(f"outputs that do not fit each other: {a.name} gives {_listed(a)}, and {b.name} gives {_listed(b)}")
    return _Files(a, b, shape, pairs, "name" if by_name else "order")


def _input_shape(
    a: OnnxRunner, b: OnnxRunner, given: tuple[int, int, int] | None, samples: Samples | None
) -> tuple[int, int, int]:
    """(C, H, W) that both files take; what they leave open is as `given`, or as the samples have it."""
    if any(one and other and one != other for one, other in zip(a.input_shape, b.input_shape, strict=True)):
        takes = f"{a.name} takes images {_sizes(a.input_shape)}, and {b.name} {_sizes(b.input_shape)}"
        raise ModelError(f"{takes}: they cannot be compared")
    known = tuple(one or other for one, other in zip(a.input_shape, b.input_shape, strict=True))
    wanted: dict[str, Sequence[int]] = {} if given is None else {"the input shape that was given is": given}
    if samples is not None:
        wanted["the samples are"] = samples.images.shape[1:]
    for what, shape in wanted.items():
        if any(one not in (None, other) for one, other in zip(known, shape, strict=True)):
            raise DataError(f"{what} {_sizes(shape)}, and {a.name} and {b.name} take images {_sizes(known)}")
        known = tuple(shape)
    channels, height, width = known
    if channels is None or height is None or width is None:
        raise OptionError(f"{a.name} and {b.name} leave the size of their images open: give --input-shape C,H,W")
    return channels, height, width


def _fit(a: OnnxRunner, one: Output, b: OnnxRunner, b_one: Output) -> bool:
    """Whether two outputs can have the same shape, as far as the files tell; each may have its file's own batch size."""
    if not one.sizes or not b_one.sizes:
        return True  # a number, or a shape that the file does not tell
    if len(one.sizes) != len(b_one.sizes):
        return False
    sizes = list(zip(one.sizes, b_one.sizes, strict=True))
    if sizes[0] == (a.batch, b.batch):
        sizes = sizes[1:]
    return all(x == y or not isinstance(x, int) or not isinstance(y, int) for x, y in sizes)


def _listed(runner: OnnxRunner) -> str:
    return ", ".join(f"{name} {_sizes(output.sizes)}" for name, output in runner.outputs.items())


def _sizes(sizes: Sequence[int | str | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"


def _latency(
    files: _Files, paths: tuple[Path, Path], batch: int | None, threads: int, rounds: int
) -> tuple[Latency | None, list[str]]:
    if batch is None and len(files.batches) == 2:
        bound = f"{files.a.name} takes batches of {files.a.batch} only, and {files.b.name} of {files.b.batch}"
        return None, [f"{bound}: no batch of one size can be timed"]
    if batch is None:
        batch = next(iter(files.batches), 1)
    return compare_latency(*paths, input_shape=files.input_shape, batch=batch, threads=threads, rounds=rounds), []


# ---- images


@dataclass(frozen=True)
class _Images:
    """What two files are compared on, and how to say it."""

    text: str
    count: int
    batches: Batches
    notes: list[str] = field(default_factory=list)


def _space(files: _Files, statement: Statement) -> InputSpace:
    """What both files are fed: as it is stated, else as they say; unknown where neither tells."""
    channels = files.input_shape[0]
    found = stated(statement, channels, files.a.name)
    if found is None:
        written = [space for runner in (files.a, files.b) if (space := of_properties(runner.metadata, channels)) and space.mean]
        if len(written) == 2 and (written[0].mean, written[0].std) != (written[1].mean, written[1].std):
            said = [" and ".join(format_numbers(values) for values in (space.mean, space.std)) for space in written]
            both = f"{files.a.name} stores mean and std {said[0]}, and {files.b.name} {said[1]}"
            raise OptionError(f"{both}: say with --mean and --std how pixels are normalised")
        found = written[0] if written else InputSpace()
    return replace(found, channels=statement.channels or found.channels)


def _given(files: _Files, samples: Samples) -> _Images:
    made = f" by {samples.method}, seed {samples.seed}" if samples.method else ""
    pieces = torch.split(samples.images.contiguous(), files.step)
    batches = ((piece.numpy(), np.full(len(piece), -1, np.int64)) for piece in pieces)
    return _Images(f"{len(samples)} samples{made}", len(samples), batches)


def _real(files: _Files, data: LabelledImages, space: InputSpace) -> _Images:
    if not space.mean:
        both = f"neither {files.a.name} nor {files.b.name} stores how pixels are normalised"
        raise OptionError(f"{both}: give --mean and --std, or --pixels")
    batches = data.batches(files.step, input_shape=files.input_shape, mean=space.mean, std=space.std, channels=space.channels)
    kind = "images without labels" if data.truths is None and data.labels.min() < 0 else "labelled images"
    return _Images(f"{len(data)} {kind}", len(data), batches)


def _procedural(files: _Files, space: InputSpace, count: int, seed: int) -> _Images:
    """Images by `fractal`, which asks a network for nothing but the shape of its images and what numbers they are."""
    known = space if space.is_known else standard(files.input_shape[0])
    blank = Network(torch.fx.symbolic_trace(nn.Identity()), files.input_shape, Source("onnx", files.a.name), known)
    made = synthesize(blank, count, method="fractal", seed=seed)
    images = _given(files, made)
    notes = ["neither samples nor data were given: the images are procedural, and the files may differ more on real ones"]
    if not space.is_known:
        notes.append("no normalisation is known: the images have mean 0 and deviation 1")
    return _Images(f"{count} procedural images (dead leaves under 1/f texture, seed {seed})", count, images.batches, notes)


# ---- labels


def _unlabelled(data: LabelledImages | None, ranks: Ranks | None) -> list[str]:
    """Why there is no accuracy, where there are images that could have told it."""
    if data is not None and ranks is None:
        return ["nobody has told the classes of the images, so accuracy is not known"]
    if ranks is not None and ranks.place is None:
        return ["no output is one score per class, so accuracy is not known"]
    return []
