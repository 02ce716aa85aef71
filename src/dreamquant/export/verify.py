"""The proof: the written file, run in the real runtime, does what was measured on the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, fx

from dreamquant.errors import VerificationError
from dreamquant.network.graph import by_image, whole_batches
from dreamquant.network.scores import file_answers
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner

AGREEMENT = 99.9  # percent of the samples' top-1 that must be the same ...
DISTANCE = 0.1  # ... and the mean difference, of the outputs' standard deviation, that must not be passed, or else ...
EXACT = 1e-3  # ... every layer must do what the student's does: outputs within this part of their standard deviation ...
BORDER = 0.01  # ... and integers that are the student's, or those next to a border that its value lies this near, in levels
TIE = 1e-6  # of the largest score: classes no further apart share a rank, as they do where scores are averages of few levels
PIECE = 16  # images whose inner values are held at a time


@dataclass(frozen=True)
class Steps:
    """The proof layer by layer: what the student makes of the file's own integers at each step, beside what the file makes.

    Of `values` integers inside the network `borders` are not the student's, but those on the other side of a border between
    two levels that its value lies on, but for the last digits of its sums; `apart` are further off, by tensor. The rest is
    the outputs' agreement and largest difference, each step's inputs being the file's.
    """

    values: int
    borders: int
    apart: dict[str, int]
    top1_agreement: float
    largest_difference: float

    def __str__(self) -> str:
        if not self.values:
            return "nothing inside it is quantized but the weights"
        first = next(iter(self.apart), None)
        if first is not None:
            return f"{sum(self.apart.values()):,} of {self.values:,} integers inside it part from the student's, first at {first}"
        apart = f"; {self.borders:,} lie on a border between two levels, and on its other side" if self.borders else ""
        return f"all {self.values:,} integers inside it are the student's, each layer taken by itself{apart}"


@dataclass(frozen=True)
class Verification:
    """How far an exported file and its student are apart on samples.

    `top1_agreement` in percent, classes of equal scores sharing their rank; differences of the first output, absolute. A
    value on the border between two levels is rounded either way by an error of the last bit, and in a deep network one such
    step moves others, up to the top class of an image that lies between two: a runtime that sums integers and a student
    that sums floats part there. `steps` holds each layer against the student's by itself, where nothing adds up.
    """

    samples: int
    top1_agreement: float
    largest_difference: float
    mean_difference: float
    steps: Steps


def verify(student: Student, file: Path, images: Tensor, integers: Mapping[str, str]) -> Verification:
    """Compare file and student on images (N, C, H, W).

    `integers` names, by the student's activation quantizers, the values of the file that hold their integers. Raises
    `VerificationError` where more than rounding parts the two: where neither the outputs are near each other with the same
    top-1, nor every layer, taken by itself, does the same.
    """
    expected = student(images)
    actual = file_answers(student.network, onnx_runner(file), images)[0]
    spread = expected.double().std(correction=0).item()
    slack = 1e-5 * expected.abs().max().item()
    difference = (expected.double() - actual.double()).abs()
    found = Verification(
        samples=len(images),
        top1_agreement=_agreement(expected, actual),
        largest_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        steps=_steps(student, file, images, actual, integers),
    )
    near = found.top1_agreement >= AGREEMENT and found.mean_difference <= DISTANCE * spread + slack
    steps = found.steps
    same = not steps.apart and steps.top1_agreement >= AGREEMENT and steps.largest_difference <= EXACT * spread + slack
    if not (near or same):  # NaN is no pass
        raise VerificationError(
            f"the exported file does not do what was measured: in ONNX Runtime {found.top1_agreement:.2f} % of {len(images)}"
            f" samples keep their top-1 and outputs differ by {found.mean_difference:.3g} on average (largest"
            f" {found.largest_difference:.3g}); "
            + (str(steps) if steps.apart else f"layer by layer only the outputs part, by up to {steps.largest_difference:.3g}")
        )
    return found


def _agreement(expected: Tensor, actual: Tensor) -> float:
    return 100.0 * _kept(expected, actual).double().mean().item()


def _kept(expected: Tensor, actual: Tensor) -> Tensor:
    """Images (and places) whose top class by `expected`, scores along axis 1, is a top class by `actual` too, ties shared."""
    if expected.dim() < 2:  # one number an image
        expected, actual = expected.unsqueeze(1), actual.unsqueeze(1)
    theirs = actual.gather(1, expected.argmax(1, keepdim=True)).squeeze(1)
    return theirs >= actual.amax(1) - TIE * actual.abs().amax(1)


def _steps(student: Student, file: Path, images: Tensor, actual: Tensor, integers: Mapping[str, str]) -> Steps:
    """The file's integers, taken out of it, and what the student makes of them; `actual` is what the file itself returns."""
    proto = onnx.load(str(file))
    found = [(tensor.quantizer, tensor.grid) for tensor in student.tensors()]
    grids = {node: grid for node, grid in found if node.name in integers and isinstance(grid, Grid)}
    for node, grid in grids.items():
        kind = TensorProto.INT8 if grid.qmin < 0 else TensorProto.UINT8
        proto.graph.output.append(helper.make_tensor_value_info(integers[node.name], kind, None))
    runner = onnx_runner(proto.SerializeToString())
    following = _Following(student.network.graph, grids)
    batch = student.network.batch
    outputs = []
    for piece in torch.split(whole_batches(images, batch), batch or PIECE):
        inner = runner.run(piece.contiguous().numpy(), [integers[node.name] for node in grids]) if grids else []
        following.integers = dict(zip(grids, inner, strict=True))
        with torch.no_grad():
            outputs.append(by_image(following.run(piece), student.network.outputs, len(piece))[0])
    expected = torch.cat(outputs)[: len(images)]
    largest = (expected.double() - actual.double()).abs().max().item()
    return Steps(following.values, following.borders, following.apart, _agreement(expected, actual), largest)


class _Following(fx.Interpreter):
    """A student that goes on from another's integers behind every quantizer, and counts where its own are not the same."""

    def __init__(self, graph: fx.GraphModule, grids: dict[fx.Node, Grid]) -> None:
        super().__init__(graph)
        self.grids = grids
        self.integers: dict[fx.Node, NDArray[Any]] = {}
        self.values = self.borders = 0
        self.apart: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.grids:
            return super().run_node(n)
        (x,), _ = self.fetch_args_kwargs_from_env(n)
        grid = self.grids[n]
        theirs = torch.from_numpy(self.integers[n]).to(x.dtype)
        scale, zero_point = grid.shaped(x.dim())
        exact = (x / scale + zero_point).clamp(grid.qmin, grid.qmax)
        apart = int((~((exact - theirs).abs() <= 0.5 + BORDER)).sum())  # NaN is apart
        self.values += x.numel()
        self.borders += int((grid.integers(x) != theirs).sum()) - apart
        if apart:
            name = n.all_input_nodes[0].name
            self.apart[name] = self.apart.get(name, 0) + apart
        return (theirs - zero_point) * scale
