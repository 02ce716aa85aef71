"""Ranges and bias correction, chosen by what they do to the outputs.

No rule on what a network looks like tells which ranges it bears: those that lose nothing on one ruin the next. So each candidate
quantizes the network on one half of the samples, and is judged by how far the answers to the other half move from the float
network's (`network.answers`). Samples that are made without data show less than real images do. A candidate that is better by no
more than chance is therefore not taken for one that cuts off less or changes less: of those within a standard error of the best,
differences being taken image by image (the rule of one standard error, Breiman et al., Classification and Regression Trees, 1984,
3.4.3), the most careful one is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreamquant.errors import ModelError
from dreamquant.network.answers import distance, spreads
from dreamquant.network.graph import Network
from dreamquant.network.outputs import Output
from dreamquant.network.scores import float_answers
from dreamquant.quantization.biases import settle_biases
from dreamquant.quantization.calibrate import calibrate, even_batches
from dreamquant.quantization.plan import CHOSEN, Bits, Plan, change_plan
from dreamquant.samples import Samples, halves

Callback = Callable[[int, int], None]  # (steps done, steps in all)
RANGES = ("minmax", "percentile", "mse", "ema", "kl")  # those that cut off least first
CORRECTIONS = ("none", "samples")  # those that change least first


@dataclass(frozen=True)
class Candidate:
    """What came of a choice: the `distance` of the answers from the float network's, and by how much more than the best one's it
    is, with the standard error of that."""

    activation_ranges: str
    bias_correction: str
    distance: float
    behind: float
    error: float


@dataclass(frozen=True)
class Choice:
    """A plan that leaves nothing to be chosen, and the candidates in the order of their care; none where nothing was."""

    plan: Plan
    candidates: tuple[Candidate, ...] = ()

    def sentence(self) -> str:
        """What was chosen, and from what; empty where nothing was."""
        if not self.candidates:
            return ""
        chosen = self.plan.activation_ranges, self.plan.bias_correction
        taken = next(one for one in self.candidates if (one.activation_ranges, one.bias_correction) == chosen)
        biases = "biases as they are" if chosen[1] == "none" else "biases corrected"
        ends = f"{min(one.distance for one in self.candidates):.3g} to {max(one.distance for one in self.candidates):.3g}"
        return (
            f"{chosen[0]}, {biases}: outputs move by {taken.distance:.3g} (the {len(self.candidates)} that were tried:"
            f" {ends}); the one that changes least of those within a standard error of the best"
        )


def choose(network: Network, samples: Samples, plan: Plan, bits: Bits, callback: Callback | None = None) -> Choice:
    """The plan with the ranges and the bias correction that it leaves to be chosen (`"outputs"`).

    Every other sample is calibrated on, and the rest judges; a single one does both. Raises what `calibrate` raises, and
    `ModelError` where no candidate's answers are finite.
    """
    ranges = RANGES if plan.activation_ranges == CHOSEN else (plan.activation_ranges,)
    corrections = CORRECTIONS if plan.bias_correction == CHOSEN else (plan.bias_correction,)
    if CHOSEN not in (plan.activation_ranges, plan.bias_correction):
        return Choice(plan)
    seen, judges = (half.images for half in halves(samples))
    expected = float_answers(network, judges)
    variances = spreads(network.outputs, expected)
    found: dict[tuple[str, str], Tensor] = {}
    for method in ranges:
        student = calibrate(network, seen, change_plan(plan, activation_ranges=method, bias_correction="none"), bits)
        for correction in corrections:
            student = replace(student, plan=change_plan(student.plan, bias_correction=correction))
            settle_biases(student, even_batches(network, seen))
            actual = float_answers(student.network, judges)
            outputs = zip(network.outputs, expected, actual, variances, strict=True)
            parts = [_apart(*output) for output in outputs if output[0].axis is not None]
            found[correction, method] = torch.stack(parts).sum(0)
            if callback is not None:
                callback(len(found), len(ranges) * len(corrections))
    finite = {name: apart for name, apart in sorted(found.items(), key=_care) if bool(apart.isfinite().all())}
    if not finite:
        raise ModelError("the quantized network's answers to the samples are not finite numbers, whatever the ranges")
    best = min(finite.values(), key=lambda apart: apart.mean().item())
    candidates = tuple(_candidate(*name, apart, best) for name, apart in finite.items())
    taken = next(one for one in candidates if one.behind <= one.error)
    settled = change_plan(plan, activation_ranges=taken.activation_ranges, bias_correction=taken.bias_correction)
    return Choice(settled, candidates)


def _apart(output: Output, expected: Tensor, actual: Tensor, variance: float) -> Tensor:
    """The distance of each image's answer: (N,), float64."""
    pairs = zip(torch.split(expected, 1), torch.split(actual, 1), strict=True)
    return torch.tensor([distance(output, one, other, variance) for one, other in pairs], dtype=torch.float64)


def _care(candidate: tuple[tuple[str, str], Tensor]) -> tuple[int, int]:
    (correction, method), _ = candidate
    return CORRECTIONS.index(correction) if correction in CORRECTIONS else 0, RANGES.index(method) if method in RANGES else 0


def _candidate(correction: str, method: str, apart: Tensor, best: Tensor) -> Candidate:
    behind = apart - best
    error = behind.std().item() / len(behind) ** 0.5 if len(behind) > 1 else 0.0
    return Candidate(method, correction, apart.mean().item(), behind.mean().item(), error)
