"""The proof: the written file, run in the real runtime, does what was measured on the student.

Three questions, each of which must be answered with yes. Does the file hold what the student holds (`readback`)? Does it, run as
it is written, compute at each step what the student computes, up to the rounding of sums (`following`), and so at every output?
And does the runtime, free to merge and reorder, still do that?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, fx

from dreamquant.errors import VerificationError
from dreamquant.exporters.following import Allowance, Comparison, Integers, biases_rounded, distance, furthest
from dreamquant.exporters.qdq import Stored
from dreamquant.exporters.readback import read_back
from dreamquant.mapped import Pieces, put_away
from dreamquant.network.graph import in_pieces, run_once
from dreamquant.network.live import at_once
from dreamquant.network.notes import shape_of
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.student import Student
from dreamquant.runtime import OnnxRunner, onnx_runner, opened

AGREEMENT = 99.9  # percent of the samples' top-1 that must be the same ...
DISTANCE = 0.1  # ... and the mean difference, of an output's standard deviation, that must not be passed, or else each step holds
HALF, SMALLEST_HALF = 2.0**-11, 2.0**-14  # what half precision rounds off, at most, as a part of a value; its least normal one
TIE = 1e-6  # of the largest score: classes no further apart share a rank, as they do where scores are averages of few levels
INDICES = 1e-3  # of an output of whole numbers, as of classes: those that a tie may send elsewhere
PIECE = 16  # images whose inner values are held at a time, at most
PROVED = 16  # images that every step is proved on; outputs are on all
ASKED = 64 * 2**20  # bytes of inner values that are asked of the file at a time
MEASURED = 4  # images that rounding is measured on


@dataclass(frozen=True)
class Steps:
    """The proof layer by layer: what the student makes of the file's own integers at each step, beside what the file makes.

    Of `values` integers inside the network `borders` are not the student's, but those on the other side of a border between
    two levels that its value lies on, but for the last digits of its sums; `apart` are further off, by tensor. The rest is
    the first output's agreement and largest difference, each step's inputs being the file's, and `outputs_apart`, by name, how
    many values of an output are further off than rounding can put them.
    """

    values: int
    borders: int
    apart: dict[str, int]
    top1_agreement: float
    largest_difference: float
    outputs_apart: dict[str, int]

    @property
    def same(self) -> bool:
        """Whether every step is the student's."""
        return not self.apart and not self.outputs_apart

    def __str__(self) -> str:
        first = next(iter(self.apart), None)
        if first is not None:
            return f"{sum(self.apart.values()):,} of {self.values:,} integers inside it part from the student's, first at {first}"
        if self.outputs_apart:
            return f"layer by layer only the outputs part: {', '.join(self.outputs_apart)}"
        if not self.values:
            return "nothing inside it is quantized but the weights"
        apart = f"; {self.borders:,} lie on a border between two levels, and on its other side" if self.borders else ""
        return f"all {self.values:,} integers inside it are the student's, each layer taken by itself{apart}"


@dataclass(frozen=True)
class OutputDifference:
    """How far file and student are apart at one output, absolute; `spread` is the standard deviation of the student's."""

    name: str
    largest: float
    mean: float
    spread: float


@dataclass(frozen=True)
class Verification:
    """How far an exported file and its student are apart on samples.

    `top1_agreement` in percent, classes of equal scores sharing their rank, and the two differences are of the first output;
    `outputs` has those of all. A value on the border between two levels is rounded either way by an error of the last bit, and
    in a deep network one such step moves others, up to the top class of an image that lies between two: a runtime that sums
    integers and a student that sums floats part there. `steps` holds each layer against the student's by itself, where nothing
    adds up, as the runtime runs the file; `written` the same as the file is written, without the runtime's optimizations.
    Steps are of at most `PROVED` of the samples, spread evenly over them.
    `stored` tensors of the file were read back and are the student's.
    """

    samples: int
    top1_agreement: float
    largest_difference: float
    mean_difference: float
    steps: Steps
    written: Steps
    outputs: tuple[OutputDifference, ...]
    stored: int


def verify(
    student: Student,
    file: Path,
    images: Tensor,
    integers: Mapping[str, str],
    stored: Mapping[str, Stored],
    outputs: Sequence[str] = (),
) -> Verification:
    """Compare file and student on images (N, C, H, W).

    `integers`, `stored` and `outputs`, by default the file's, say where the student's tensors are in it, as `to_onnx` does.
    Raises `VerificationError` where a stored tensor is not the student's; where a step of the file, as it is written, is further
    from the student's than rounding can put it; and where the runtime's own way to compute the file moves an output from the
    student's, unless it is by values that lie on a border. A file for another runtime is run as it is written, and no other way.
    """
    target = student.plan.target
    elsewhere = target is not None and not target.proven  # another runtime has other kernels: the file is proven as it is written
    runner = onnx_runner(file, shown=outputs, optimize=not elsewhere)
    proto, outputs = onnx.load(str(file)), list(runner.outputs)
    count = read_back(student, proto, integers, stored)
    compared = _Compared(student, proto, outputs, integers)
    few = images[:: -(-len(images) // PROVED)]
    allowance = compared.allowance(few)
    written = compared.steps(few, allowance)
    if not written.same:
        raise VerificationError(f"the exported file does not do what was measured: {written}")
    steps = written if elsewhere else compared.steps(few, allowance, runner)
    tallies, kept = [_Sums(name) for name in compared.names], list[Tensor]()
    for piece in compared.pieces(images):
        expected, actual = run_once(student.network.graph, piece), _outputs(runner, piece, compared.names)
        kept.append(_kept(expected[0], actual[0]).flatten())
        for tally, one, other in zip(tallies, expected, actual, strict=True):
            tally.add(one, other)
    differences = tuple(tally.difference() for tally in tallies)
    found = Verification(
        samples=len(images),
        top1_agreement=100.0 * torch.cat(kept).double().mean().item(),
        largest_difference=differences[0].largest,
        mean_difference=differences[0].mean,
        steps=steps,
        written=written,
        outputs=differences,
        stored=count,
    )
    far = [
        output
        for output, allowed in zip(differences, allowance.outputs, strict=True)
        if not output.mean <= DISTANCE * output.spread + allowed  # NaN is far
    ]
    # integers that are looked at are fused in other ways than those that are not: where all of the former are the student's, an
    # output of the latter may lie across a border, but not far
    near = not far and (found.top1_agreement >= AGREEMENT or not steps.apart)
    if not (near or steps.same):
        worst = far[0] if far else differences[0]
        raise VerificationError(
            f"the exported file does not do what was measured: in ONNX Runtime {found.top1_agreement:.2f} % of {len(images)}"
            f" samples keep their top-1 and {worst.name} differs by {worst.mean:.3g} on average (largest {worst.largest:.3g});"
            f" {steps}"
        )
    return found


def _kept(expected: Tensor, actual: Tensor) -> Tensor:
    """Images (and places) whose top class by `expected`, scores along axis 1, is a top class by `actual` too, ties shared."""
    expected, actual = expected.double(), actual.double()
    if expected.dim() < 2:  # one number an image, which has no rival
        expected, actual = expected.reshape(-1, 1), actual.reshape(-1, 1)
    theirs = actual.gather(1, expected.argmax(1, keepdim=True)).squeeze(1)
    return theirs >= actual.amax(1) - TIE * actual.abs().amax(1)


class _Sums:
    """Sums up how far file and student are apart at one output, piece by piece of the images; which axis is the images' is not
    asked."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.largest = name, 0, torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(3, dtype=torch.float64)  # of differences, of values and of their squares

    def add(self, expected: Tensor, actual: Tensor) -> None:
        self.count += expected.numel()
        if expected.numel():
            off, values = distance(expected, actual), expected.double()
            self.largest = torch.maximum(self.largest, off.max())
            self.sums += torch.stack([off.sum(), values.sum(), values.square().sum()])

    def difference(self) -> OutputDifference:
        if not self.count:
            return OutputDifference(self.name, 0.0, 0.0, 0.0)
        off, mean, square = (self.sums / self.count).tolist()
        return OutputDifference(self.name, self.largest.item(), off, max(square - mean * mean, 0.0) ** 0.5)


def _outputs(runner: OnnxRunner, piece: Tensor, names: list[str]) -> list[Tensor]:
    return [torch.from_numpy(value) for value in runner.run(piece.contiguous().numpy(), names)]


class _Compared:
    """A student beside its file, whose inner integers are outputs as well here."""

    def __init__(self, student: Student, proto: onnx.ModelProto, outputs: Sequence[str], integers: Mapping[str, str]) -> None:
        self.network, self.graph = student.network, student.network.graph
        (batch, *_), given = proto.graph.input[0].type.tensor_type.shape.dim, student.network.batch
        target = student.plan.target
        fixed = target is not None and target.static_shapes  # where sizes inside say nothing of images either
        self.batch = given or (batch.dim_value if fixed or batch.dim_value > 1 else None)
        self.names = list(outputs)
        half = {output.name for output in proto.graph.output if output.type.tensor_type.elem_type == TensorProto.FLOAT16}
        self.rounded = [HALF if name in half else 0.0 for name in self.names]
        found = [(tensor.quantizer, tensor.grid) for tensor in student.tensors()]
        self.grids = {node: grid for node, grid in found if node.name in integers and isinstance(grid, Grid)}
        self.inner = [integers[node.name] for node in self.grids]
        self.opened = opened(proto, [*self.names, *self.inner])

    def pieces(self, images: Tensor, size: int = PIECE) -> Pieces:
        return in_pieces(images, self.batch, at_once(self.network, size, kept=True))

    def allowance(self, images: Tensor) -> Allowance:
        piece = self.pieces(images, MEASURED)[0]
        _, integers = self._run(onnx_runner(self.opened, optimize=False), piece)
        allowance = Allowance(self.graph, self.grids, piece, integers)
        put_away()
        return allowance

    def steps(self, images: Tensor, allowance: Allowance, file: OnnxRunner | None = None) -> Steps:
        """Each step as it is written or, where the file's own runner is given, as that runs it."""
        runner = onnx_runner(self.opened, optimize=file is not None)
        allowed = allowance.levels
        if file is not None:
            allowed = {node: allowed[node] + more for node, more in biases_rounded(self.graph, self.grids).items()}
        following = Comparison(self.graph, self.grids, allowed)
        kept, largest, apart = [], 0.0, dict.fromkeys(self.names, 0)
        for piece in self.pieces(images):
            outputs, integers = self._run(runner, piece)
            if file is not None:
                outputs = _outputs(file, piece, self.names)
            expected = following.run(piece, integers)
            if [value.shape for value in expected] != [value.shape for value in outputs]:
                raise VerificationError(
                    f"the exported file does not do what was measured: its outputs are {_shapes(outputs)}, the student's"
                    f" {_shapes(expected)}"
                )
            kept.append(_kept(expected[0], outputs[0]).flatten())
            largest = max(largest, furthest(expected[0], outputs[0]))
            for name, one, other, most, part in zip(self.names, expected, outputs, allowance.outputs, self.rounded, strict=True):
                apart[name] += _apart(one, other, most + part * (one.double().abs() + SMALLEST_HALF))
        agreement = 100.0 * torch.cat(kept).double().mean().item()
        further = {name: count for name, count in apart.items() if count}
        return Steps(following.values, following.borders, following.apart, agreement, largest, further)

    def _run(self, runner: OnnxRunner, piece: Tensor) -> tuple[list[Tensor], Integers]:
        integers = _Integers(runner, piece, self.names, dict(zip(self.grids, self.inner, strict=True)))
        return [torch.from_numpy(value) for value in integers.outputs], integers


class _Integers(Mapping[fx.Node, NDArray[Any]]):
    """The integers of a file's quantizers on images, which are asked for in the order of the graph: `ASKED` bytes of them are
    held, and the file runs once more for the next."""

    def __init__(self, runner: OnnxRunner, images: Tensor, outputs: Sequence[str], names: Mapping[fx.Node, str]) -> None:
        self._runner, self._images, self._names = runner, images.contiguous().numpy(), names
        self._groups: list[list[fx.Node]] = [[]]
        taken = 0
        for node in names:
            size = len(images) * math.prod(shape_of(node)[1:])
            if taken + size > ASKED and self._groups[-1]:
                self._groups.append([])
                taken = 0
            self._groups[-1].append(node)
            taken += size
        self._places = {node: place for place, group in enumerate(self._groups) for node in group}
        self.outputs = self._ask(0, outputs)

    def _ask(self, place: int, outputs: Sequence[str] = ()) -> list[NDArray[Any]]:
        """Hold a group in place of the one before; returns the outputs that were asked for beside it."""
        group = self._groups[place]
        self._held: dict[fx.Node, NDArray[Any]] = {}
        found = self._runner.run(self._images, [*outputs, *(self._names[node] for node in group)])
        self._held = dict(zip(group, found[len(outputs) :], strict=True))
        return found[: len(outputs)]

    def __getitem__(self, node: fx.Node) -> NDArray[Any]:
        if node not in self._held:
            self._ask(self._places[node])
        return self._held[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _apart(expected: Tensor, actual: Tensor, allowed: Tensor) -> int:
    """How many values of an output are further apart than is allowed; of whole numbers, a few may be, as ties go either way."""
    count = int((~(distance(expected, actual) <= allowed)).sum())
    return count if expected.is_floating_point() or count > 1 + INDICES * expected.numel() else 0


def _shapes(values: list[Tensor]) -> str:
    return ", ".join(str(tuple(value.shape)) for value in values)
