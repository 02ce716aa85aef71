"""Ranges and bias correction, chosen by what they do to the outputs.

No rule on what a network looks like tells which ranges it bears: those that lose nothing on one ruin the next. So the range of
every tensor is chosen among those of several methods by how far its error moves the answers, to first order (`effect`). What
came of it quantizes the network on one half of the samples, beside ranges that cut off nothing and ranges of least error, and
is judged by how far the answers to the other half move from the float network's (`network.answers`).

Samples that are made without data show less than real images do. What is better by no more than chance is therefore not taken
for what cuts off less: of all that lie within a standard error of the best, differences being taken image by image (the rule of
one standard error, Breiman et al., Classification and Regression Trees, 1984, 3.4.3), the most careful is. And what changes the
network, rather than the grids that its own values need, has to pay for it: it must leave less than half of the distance.
Real images show what others will: of them the best is taken, and a change where it is better by more than a standard error.

Bias correction is such a change. What it takes off is the mean error on the samples, and other images have another. It stays
away where the samples show nothing that an output looks for, as a detector finds no boxes on procedural images: it makes the
answers to nothing better, and others worse. What is judged there is how far scores move before they are cut off (`margins`).

Float tensors are another. Where the answers still move by more than can be left alone, those to which first order gives the
largest effects are tried in float, a few at most, counted for all of them together. How far answers to nothing move says
neither that they can be left alone nor what a float tensor is worth: there the few that hold most of the effects stay in float
by first order alone, which tells where errors are large, if not how much they will matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import ModelError
from dreamquant.mapped import Pieces
from dreamquant.network.answers import busy, distance, margins, shows, spreads
from dreamquant.network.graph import Network
from dreamquant.network.live import at_once
from dreamquant.network.outputs import Output
from dreamquant.network.scores import MOST, float_answers
from dreamquant.quantization.activations import Deciders, activation_grids, grid_finder, set_grids
from dreamquant.quantization.biases import settle_biases
from dreamquant.quantization.calibrate import calibrate, even_batches
from dreamquant.quantization.effect import effects, together
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.histogram import Values
from dreamquant.quantization.plan import CHOSEN, Bits, Plan, change_plan, keep_in_float
from dreamquant.quantization.student import Student, prepare
from dreamquant.quantization.weights import weight_grids
from dreamquant.samples import Samples, halves

Callback = Callable[[int, int], None]  # (steps done, steps in all)
Grids = Mapping[str, Grid]  # by the quantizer's name
RANGES = ("minmax", "percentile", "mse", "ema", "kl")  # that a tensor may have; those that cut off least first
BY_TENSOR = "by tensor"
WHOLE = ("minmax", BY_TENSOR, "mse")  # that the network may have; the most careful first
CAREFUL, CORRECTED = "none", "samples"  # of bias correction
FELT = 16  # images that effects are told from
MATTERS = 0.05  # nats: of a distance below this, where places have no ground to be averaged with, no answer is to change
HALF = 0.5  # of a distance: what is left with corrected biases, or with tensors in float, that are worth it
STEPS = 8  # halvings of what the tensors that are tried leave of all effects
SPARED = 16  # of so many quantized tensors one may stay in float


@dataclass(frozen=True)
class Candidate:
    """What came of a choice: the `distance` of the answers from the float network's, and by how much more than that of the best
    ranges it is, biases being as they are, with the standard error of that."""

    ranges: str
    bias_correction: str
    distance: float
    behind: float
    error: float


@dataclass(frozen=True)
class Choice:
    """A plan that leaves nothing to be chosen; what was `taken`, and all candidates, the careful first, corrected biases last.

    `shown` says whether the samples held what all outputs look for, `spared` what is left of the distance with `float_tensors`:
    measured, or, where they do not show it, by first order.
    """

    plan: Plan
    taken: Candidate | None = None
    candidates: tuple[Candidate, ...] = ()
    shown: bool = True
    spared: float | None = None

    def sentence(self) -> str:
        """What was chosen, and from what; empty where nothing was."""
        if self.taken is None:
            return ""
        biases = "as they are" if self.taken.bias_correction == "none" else "corrected"
        found = [one.distance for one in self.candidates]
        blind = "" if self.shown else "; the samples show nothing that the outputs look for"
        told = "" if self.shown else ", by first order,"
        left = "" if self.spared is None else f"; {self.spared:.3g}{told} with {', '.join(self.plan.float_tensors)} in float"
        return (
            f"{self.taken.ranges}, biases {biases}: outputs move by {self.taken.distance:.3g}, those of all {len(found)} tried"
            f" by {min(found):.3g} to {max(found):.3g}{blind}{left}"
        )


class _Judge:
    """Measures how far a student's answers are from the float network's, image by image."""

    def __init__(self, network: Network, images: Tensor) -> None:
        self._images, self._outputs = images, network.outputs
        self._expected = float_answers(network, images)
        self._spreads = spreads(network.outputs, self._expected)
        told = [(output, value) for output, value in zip(network.outputs, self._expected, strict=True) if output.axis is not None]
        self.shown = all(shows(*one) for one in told)
        self.matters = MATTERS * min((busy(*one) for one in told), default=1.0)

    def __call__(self, student: Student) -> Tensor:
        """(N,), float64."""
        found, start = [], 0
        for piece in Pieces(self._images, at_once(student.network, MOST)):
            actual = [value.to(CPU) for value in student.answers(piece)]
            expected = [value[start : start + len(piece)] for value in self._expected]
            answers = enumerate(zip(self._outputs, expected, actual, self._spreads, strict=True))
            found.append(
                torch.stack([self._apart(seed, *answer) for seed, answer in answers if answer[0].axis is not None]).sum(0)
            )
            start += len(piece)
        return torch.cat(found)

    def _apart(self, seed: int, output: Output, expected: Tensor, actual: Tensor, variance: float) -> Tensor:
        if not self.shown and expected.is_floating_point():
            one, other = (margins(output, value, variance, seed) for value in (expected, actual))
            return (one - other).double().square().mean(1)
        pairs = zip(torch.split(expected, 1), torch.split(actual, 1), strict=True)
        return torch.tensor([distance(output, one, other, variance) for one, other in pairs], dtype=torch.float64, device=CPU)


def choose(network: Network, samples: Samples, plan: Plan, bits: Bits, callback: Callback | None = None) -> Choice:
    """The plan with the ranges, the bias correction and the float tensors that it leaves to be chosen (`"outputs"`).

    Every other sample is calibrated on, and the rest judges; a single one does both. Where the outputs have no gradient, methods
    are tried for all tensors at once, none tensor by tensor, and no tensor is spared. Raises what `calibrate` raises, and
    `ModelError` where no candidate's answers are finite.
    """
    if CHOSEN not in (plan.activation_ranges, plan.bias_correction, plan.spare):
        return Choice(plan)
    seen, judges = (half.images for half in halves(samples))
    seen, judge = even_batches(network, seen), _Judge(network, judges)
    methods = RANGES if plan.activation_ranges == CHOSEN else (plan.activation_ranges,)
    tried = _tried(network, seen, plan, bits, methods)
    errors = 0.0 if samples.real else 1.0  # standard errors that careful ranges may be behind by
    apart: dict[tuple[str, str], Tensor] = {}

    def measure(name: str, correction: str) -> None:
        set_grids(tried.student, tried.grids[name])
        student = replace(tried.student, plan=change_plan(tried.student.plan, bias_correction=correction))
        settle_biases(student, seen)
        apart[name, correction] = judge(student)
        if callback is not None:
            callback(len(apart), len(tried.grids) + 1)

    asked = CAREFUL if plan.bias_correction == CHOSEN else plan.bias_correction
    for name in tried.grids:
        measure(name, asked)
    finite = [one for one in apart if bool(apart[one].isfinite().all())]
    if not finite:
        raise ModelError("the quantized network's answers to the samples are not finite numbers, whatever the ranges")
    best = min((apart[one] for one in finite), key=lambda each: each.mean().item())
    taken = next(one for one in (_candidate(*one, apart[one], best) for one in finite) if one.behind <= errors * one.error)
    if plan.bias_correction == CHOSEN and judge.shown:
        measure(taken.ranges, CORRECTED)
        corrected = _candidate(taken.ranges, CORRECTED, apart[taken.ranges, CORRECTED], best)
        gained = _candidate(taken.ranges, CORRECTED, apart[taken.ranges, CORRECTED], apart[taken.ranges, asked])
        better = gained.behind + gained.error < 0 if samples.real else corrected.distance < HALF * taken.distance
        taken = corrected if better else taken
    candidates = tuple(_candidate(*one, each, best) for one, each in apart.items())
    method, own = (RANGES[0], tried.own) if taken.ranges == BY_TENSOR else (taken.ranges, {})
    settled = change_plan(plan, activation_ranges=method, tensor_ranges=own, bias_correction=taken.bias_correction, spare="none")
    choice = Choice(settled, taken, candidates, judge.shown)
    return _spared(network, seen, judge, choice, tried, bits) if plan.spare == CHOSEN else choice


@dataclass(frozen=True)
class _Tried:
    """A student whose weights have their grids; activations' grids by what they are called, a method or `BY_TENSOR`; by quantizer
    the method that its errors ask for, and how far grids move the answers there (images x margins, grids)."""

    student: Student
    grids: dict[str, Grids]
    own: dict[str, str]
    moves: dict[str, Callable[[list[Grid]], Tensor]]


def _tried(network: Network, images: Tensor, plan: Plan, bits: Bits, methods: Sequence[str]) -> _Tried:
    """What the methods find on images (N, C, H, W); tensor by tensor only where errors can be followed to the outputs."""
    first = change_plan(plan, activation_ranges=methods[0], bias_correction="none")
    student, widths, deciders = prepare(network, first, bits)
    plans = {method: change_plan(first, activation_ranges=method) for method in methods}
    finders = {name: grid_finder(replace(student, plan=one), widths, deciders, images) for name, one in plans.items()}
    moves = _moves(student, deciders, images)
    found: dict[str, dict[str, Grid]] = {method: {} for method in methods}

    def find(name: str, values: Values) -> Grid:
        for method, finder in finders.items():
            found[method][name] = finder(name, values)
        return found[methods[0]][name]

    weight_grids(student, widths)
    activation_grids(student, widths, deciders, images, find)
    if not found[methods[0]]:  # they come from elsewhere, and are in place
        return _Tried(student, {methods[0]: {}}, {}, {})
    if len(methods) == 1 or not moves:
        return _Tried(student, dict(found), {}, moves)
    own = {}
    for name, moved in moves.items():
        squares = moved([grids[name] for grids in found.values()])
        behind = squares - squares[:, squares.mean(0).argmin(), None]
        within = behind.mean(0) <= behind.std(0, correction=0) / len(behind) ** 0.5
        own[name] = methods[int(within.nonzero()[0])]
    mixed = {name: found[own.get(name, methods[0])][name] for name in found[methods[0]]}
    return _Tried(student, {name: found.get(name, mixed) for name in WHOLE}, own, moves)


def _moves(student: Student, deciders: Deciders, images: Tensor) -> dict[str, Callable[[list[Grid]], Tensor]]:
    nodes = {node for group in deciders.values() for node in group}
    try:
        known = effects(student.network, nodes, images[:FELT])
    except ModelError:
        return {}
    heard = {name: [known[node] for node in group if node in known] for name, group in deciders.items()}
    return {name: together(parts).moves for name, parts in heard.items() if parts}


def _spared(network: Network, images: Tensor, judge: _Judge, choice: Choice, tried: _Tried, bits: Bits) -> Choice:
    """The choice with the fewest tensors in float that leave less than half of a distance that matters.

    Those of the largest effects are tried together: as few as hold half of what first order tells of all, three quarters, and so
    on, up to one of `SPARED`. Samples that show nothing have no say in it: the fewest that hold three quarters are taken, or else
    half.
    """
    assert choice.taken is not None
    if not tried.moves or (choice.shown and choice.taken.distance <= judge.matters):
        return choice
    grids, tested = tried.grids[choice.taken.ranges], 0
    cost = {name: moved([grids[name]]).mean().item() for name, moved in tried.moves.items() if name in grids}
    order = sorted(cost, key=lambda name: -cost[name])
    shares = torch.tensor([cost[name] for name in order], dtype=torch.float64, device=CPU).cumsum(0)
    for power in range(1, STEPS) if choice.shown else (2, 1):
        few = int((shares < (1 - HALF**power) * shares[-1]).sum()) + 1
        if few * SPARED > len(order) or few == tested:
            continue
        tested, plan = few, keep_in_float(choice.plan, order[:few])
        if not choice.shown:
            return replace(choice, plan=plan, spared=choice.taken.distance * (1 - shares[few - 1] / shares[-1]).item())
        left = judge(calibrate(network, images, plan, bits)).mean().item()
        if left <= HALF * choice.taken.distance:
            return replace(choice, plan=plan, spared=left)
    return choice


def _candidate(ranges: str, correction: str, apart: Tensor, best: Tensor) -> Candidate:
    behind = apart - best
    error = behind.std().item() / len(behind) ** 0.5 if len(behind) > 1 else 0.0
    return Candidate(ranges, correction, apart.mean().item(), behind.mean().item(), error)
