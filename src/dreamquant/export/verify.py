"""The proof: the written file, run in the real runtime, does what was measured on the student."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dreamquant.errors import VerificationError
from dreamquant.network.graph import run_batched
from dreamquant.quantization.grid import FakeQuantize, Grid
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner

AGREEMENT = 99.9  # percent of the samples' top-1 that must be the same ...
DISTANCE = 0.1  # ... and the mean difference, of the outputs' standard deviation, that must not be passed, or else ...
ROUNDING_FACTOR = 3.0  # ... the file may be this many times as far off as the student's own arithmetic
TIE = 1e-6  # of the largest score: classes no further apart share a rank, as they do where scores are averages of few levels
TRIFLE = 0.25  # of the distance above: what a runtime's integer sums, rounded once more in each layer, make of 20 layers


@dataclass(frozen=True)
class Verification:
    """How far an exported file and its student are apart on samples.

    `top1_agreement` in percent, classes of equal scores sharing their rank; differences of the first output, absolute. A
    value on the border between two levels is rounded either way by an error of the last bit, and in a deep network one such
    step moves others: a runtime that sums integers and a student that sums floats part there. So where the student in single
    precision has an agreement below 99.9 %, or a mean difference above a tenth of the outputs' standard deviation, it is run
    in double precision too, whose sums are as exact as those of integers. `precision` is the one whose top-1 the file keeps
    more often (or else whose outputs are nearer), `rounding_agreement` and `rounding_difference` are what the student's own
    two precisions make of each other: a yardstick of what another order of sums may cost.
    """

    samples: int
    top1_agreement: float
    largest_difference: float
    mean_difference: float
    precision: Literal["single", "double"] = "single"
    rounding_agreement: float | None = None
    rounding_difference: float | None = None


def verify(student: Student, file: Path, images: Tensor) -> Verification:
    """Compare file and student on images (N, C, H, W); `VerificationError` when they part by more than rounding explains."""
    expected = student(images)
    actual = torch.from_numpy(onnx_runner(file)(images.contiguous().numpy()))
    found = _compare(expected, actual)
    if found.top1_agreement >= AGREEMENT and found.mean_difference <= _near(expected):
        return found
    exact = _in_double_precision(student, images)
    itself = _compare(expected, exact)
    rounding = itself.mean_difference
    both = found, replace(_compare(exact, actual), precision="double")
    nearest = min(one.mean_difference for one in both)
    found = min(both, key=lambda one: (-one.top1_agreement, one.mean_difference))
    found = replace(found, rounding_agreement=itself.top1_agreement, rounding_difference=rounding)
    if not nearest <= max(ROUNDING_FACTOR * rounding, TRIFLE * _near(expected)):  # NaN is no pass
        raise VerificationError(
            f"the exported file does not do what was measured: in ONNX Runtime {found.top1_agreement:.2f} % of {len(images)}"
            f" samples keep their top-1 and outputs differ by {nearest:.3g} on average (largest"
            f" {found.largest_difference:.3g}), where rounding explains {rounding:.3g}"
        )
    return found


def _near(expected: Tensor) -> float:
    """The mean difference up to which outputs count as the same."""
    return DISTANCE * expected.double().std(correction=0).item() + 1e-5 * expected.abs().max().item()


def _compare(expected: Tensor, actual: Tensor) -> Verification:
    difference = (expected.double() - actual.double()).abs()
    return Verification(
        samples=len(expected),
        top1_agreement=100.0 * _kept(expected, actual).double().mean().item(),
        largest_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
    )


def _kept(expected: Tensor, actual: Tensor) -> Tensor:
    """Images (and places) whose top class by `expected`, scores along axis 1, is a top class by `actual` too, ties shared."""
    theirs = actual.gather(1, expected.argmax(1, keepdim=True)).squeeze(1)
    return theirs >= actual.amax(1) - TIE * actual.abs().amax(1)


def _in_double_precision(student: Student, images: Tensor) -> Tensor:
    graph = copy.deepcopy(student.network.graph).double()
    for module in graph.modules():
        if isinstance(module, FakeQuantize) and isinstance(module.grid, Grid):
            grid = module.grid
            module.grid = replace(grid, scale=grid.scale.double(), zero_point=grid.zero_point.double())
    with torch.no_grad():
        return run_batched(graph, images.double(), student.network.batch)
