"""Ranges and bias correction, chosen by what they do to the outputs.

No rule on what a network looks like tells which ranges it bears: those that lose nothing on one ruin the next. So the range of
every tensor is chosen among those of several methods by how far its error moves the answers, to first order (`effect`). What
came of it quantizes the network on one half of the samples, beside ranges that cut off nothing and ranges of least error, each
with and without bias correction, and is judged by how far the answers to the other half move from the float network's
(`network.answers`).

Samples that are made without data show less than real images do. What is better by no more than chance is therefore not taken for
what cuts off less or changes less: of all that lie within a standard error of the best, differences being taken image by image
(the rule of one standard error, Breiman et al., Classification and Regression Trees, 1984, 3.4.3), the most careful is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreamquant.errors import ModelError
from dreamquant.network.answers import distance, spreads
from dreamquant.network.graph import Network
from dreamquant.network.outputs import Output
from dreamquant.network.scores import float_answers
from dreamquant.quantization.activations import Deciders, activation_grids, grid_finder, set_grids
from dreamquant.quantization.biases import settle_biases
from dreamquant.quantization.calibrate import even_batches
from dreamquant.quantization.effect import effects, together
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.plan import CHOSEN, Bits, Plan, change_plan
from dreamquant.quantization.student import Student, prepare
from dreamquant.quantization.walk import Chunks
from dreamquant.quantization.weights import weight_grids
from dreamquant.samples import Samples, halves

Callback = Callable[[int, int], None]  # (steps done, steps in all)
Grids = Mapping[str, Grid]  # by the quantizer's name
RANGES = ("minmax", "percentile", "mse", "ema", "kl")  # that a tensor may have; those that cut off least first
BY_TENSOR = "by tensor"
WHOLE = ("minmax", BY_TENSOR, "mse")  # that the network may have; the most careful first
CORRECTIONS = ("none", "samples")  # those that change least first
FELT = 16  # images that effects are told from
CHUNK = 8  # images that are judged at once


@dataclass(frozen=True)
class Candidate:
    """What came of a choice: the `distance` of the answers from the float network's, and by how much more than the best one's it
    is, with the standard error of that."""

    ranges: str
    bias_correction: str
    distance: float
    behind: float
    error: float


@dataclass(frozen=True)
class Choice:
    """A plan that leaves nothing to be chosen; what was `taken`, and all candidates, in the order of their care."""

    plan: Plan
    taken: Candidate | None = None
    candidates: tuple[Candidate, ...] = ()

    def sentence(self) -> str:
        """What was chosen, and from what; empty where nothing was."""
        if self.taken is None:
            return ""
        biases = "as they are" if self.taken.bias_correction == "none" else "corrected"
        found = [one.distance for one in self.candidates]
        return (
            f"{self.taken.ranges}, biases {biases}: outputs move by {self.taken.distance:.3g}; the most careful of those within a"
            f" standard error of the best of {len(found)} ({min(found):.3g} to {max(found):.3g})"
        )


def choose(network: Network, samples: Samples, plan: Plan, bits: Bits, callback: Callback | None = None) -> Choice:
    """The plan with the ranges and the bias correction that it leaves to be chosen (`"outputs"`).

    Every other sample is calibrated on, and the rest judges; a single one does both. Where the outputs have no gradient, the
    methods are tried for all tensors at once, and none tensor by tensor. Raises what `calibrate` raises, and `ModelError` where
    no candidate's answers are finite.
    """
    if CHOSEN not in (plan.activation_ranges, plan.bias_correction):
        return Choice(plan)
    seen, judges = (half.images for half in halves(samples))
    methods = RANGES if plan.activation_ranges == CHOSEN else (plan.activation_ranges,)
    corrections = CORRECTIONS if plan.bias_correction == CHOSEN else (plan.bias_correction,)
    student, found, by_tensor = _found(network, even_batches(network, seen), plan, bits, methods)
    if by_tensor:
        found = {name: found[name] if name in found else _mixed(found, by_tensor) for name in WHOLE}
    expected = float_answers(network, judges, chunk=CHUNK)
    variances = spreads(network.outputs, expected)
    apart: dict[tuple[str, str], Tensor] = {}
    for name, grids in found.items():
        set_grids(student, grids)
        for correction in corrections:
            student = replace(student, plan=change_plan(student.plan, bias_correction=correction))
            settle_biases(student, even_batches(network, seen))
            actual = float_answers(student.network, judges, chunk=CHUNK)
            outputs = zip(network.outputs, expected, actual, variances, strict=True)
            parts = [_apart(*output) for output in outputs if output[0].axis is not None]
            apart[name, correction] = torch.stack(parts).sum(0)
            if callback is not None:
                callback(len(apart), len(found) * len(corrections))
    finite = {
        one: apart[one] for correction in corrections for one in apart if one[1] == correction and apart[one].isfinite().all()
    }
    if not finite:
        raise ModelError("the quantized network's answers to the samples are not finite numbers, whatever the ranges")
    best = min(finite.values(), key=lambda each: each.mean().item())
    candidates = tuple(_candidate(*one, each, best) for one, each in finite.items())
    taken = next(one for one in candidates if one.behind <= one.error)
    ranges = {"activation_ranges": RANGES[0], "tensor_ranges": by_tensor} if taken.ranges == BY_TENSOR else {}
    ranges = ranges or {"activation_ranges": taken.ranges}
    return Choice(change_plan(plan, **ranges, bias_correction=taken.bias_correction), taken, candidates)


def _found(
    network: Network, images: Tensor, plan: Plan, bits: Bits, methods: Sequence[str]
) -> tuple[Student, dict[str, Grids], dict[str, str]]:
    """A student whose weights have their grids, each method's grids of activations on images (N, C, H, W), and by quantizer the
    method that its errors ask for; nothing there, where there is one method, or errors cannot be followed to the outputs."""
    student, widths, deciders = prepare(network, change_plan(plan, activation_ranges=methods[0], bias_correction="none"), bits)
    plans = {method: change_plan(student.plan, activation_ranges=method) for method in methods}
    finders = {name: grid_finder(replace(student, plan=one), widths, deciders, images) for name, one in plans.items()}
    felt = _felt(student, deciders, images) if len(methods) > 1 else {}
    found: dict[str, dict[str, Grid]] = {method: {} for method in methods}

    def find(name: str, values: list[Chunks]) -> Grid:
        for method, finder in finders.items():
            found[method][name] = finder(name, values)
        return found[methods[0]][name]

    weight_grids(student, widths)
    activation_grids(student, widths, deciders, images, find)
    if not found[methods[0]]:  # they come from elsewhere, and are in place
        return student, {methods[0]: {}}, {}
    own = {}
    for name, moved in felt.items():
        squares = moved([grids[name] for grids in found.values()])
        behind = squares - squares[:, squares.mean(0).argmin(), None]
        within = behind.mean(0) <= behind.std(0, correction=0) / len(behind) ** 0.5
        own[name] = methods[int(within.nonzero()[0])]
    return student, dict(found), own


def _felt(student: Student, deciders: Deciders, images: Tensor) -> dict[str, Callable[[list[Grid]], Tensor]]:
    """By quantizer, what a choice of grids does to the answers: their squared moves, image by image."""
    nodes = {node for group in deciders.values() for node in group}
    try:
        known = effects(student.network, nodes, images[:FELT])
    except ModelError:
        return {}
    heard = {name: [known[node] for node in group if node in known] for name, group in deciders.items()}
    return {name: together(parts).moves for name, parts in heard.items() if parts}


def _mixed(found: Mapping[str, Grids], own: Mapping[str, str]) -> Grids:
    return {name: found[own.get(name, RANGES[0])][name] for name in found[RANGES[0]]}


def _apart(output: Output, expected: Tensor, actual: Tensor, variance: float) -> Tensor:
    """The distance of each image's answer: (N,), float64."""
    pairs = zip(torch.split(expected, 1), torch.split(actual, 1), strict=True)
    return torch.tensor([distance(output, one, other, variance) for one, other in pairs], dtype=torch.float64)


def _candidate(ranges: str, correction: str, apart: Tensor, best: Tensor) -> Candidate:
    behind = apart - best
    error = behind.std().item() / len(behind) ** 0.5 if len(behind) > 1 else 0.0
    return Candidate(ranges, correction, apart.mean().item(), behind.mean().item(), error)
