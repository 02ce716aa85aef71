"""How much accuracy a quantized network is expected to lose, told without a single labelled image, and how far to believe it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dreamquant.assess.agreement import Agreement
from dreamquant.assess.probes import Probe
from dreamquant.network.answers import possible
from dreamquant.network.attention import attentions
from dreamquant.network.graph import Network
from dreamquant.network.outputs import class_output
from dreamquant.network.scores import knows_classes

SLACK = 0.25  # percent: smaller losses are not told apart, nor are they by the images of a test set
SMALLEST_KL = 1e-4
MEASURED = "measured"  # of an input space


@dataclass(frozen=True)
class Trust:
    """The expected loss: how many percent of what the float network gets right the quantized one gets wrong, on balance.

    Of 70.0 % top-1, a `drop` of 2 leaves 68.6 %. The interval from `low` to `high` held the true loss in `level` percent of the
    cases, every network having the same say, when the network in question was left out of the fit. It rests on the
    quantized network's answers beside the float one's on images that had no part in quantizing it, set against losses measured
    with labels in `cases` quantizations of `networks` networks. There is none where `unlike`, `beyond` or `against` say why.
    """

    drop: float
    low: float
    high: float
    level: float
    cases: int
    networks: int


@dataclass(frozen=True)
class Fit:
    """What `benchmarks/trust.py` found: weights of the features, quantiles of what they leave unexplained, and on what."""

    weights: list[float]
    below: float
    above: float
    level: float
    cases: int
    networks: int
    ranges: dict[str, tuple[float, float]]  # of each kind of probe: the divergences that were seen
    confidence: tuple[float, float]  # of the float networks on the first kind of probe
    images: dict[str, int]  # of each kind of probe: how many there were at least


def features(probes: list[Probe], *, learned: bool) -> list[float]:
    """What the loss is told from: 1, the mean logarithm of the divergences, the log odds of the float network's confidence on
    procedural images, and whether rounding or weights were learnt on images.

    The same divergence costs a network more that is less sure of its answers. What is learnt on images brings the answers on
    photographs nearer than those on the probes, which are neither.
    """
    divergences = [math.log(max(probe.kl, SMALLEST_KL)) for probe in probes]
    sure = min(max(probes[0].confidence, 0.01), 0.99)
    return [1.0, sum(divergences) / len(divergences), math.log(sure / (1 - sure)), float(learned)]


def to_scale(drop: float) -> float:
    """A loss in percent on the scale where the features act on it by addition: the logarithm of its odds."""
    kept = min(max(drop, 0.0), 100.0)
    return math.log((kept + SLACK) / (100.0 - kept + SLACK))


def from_scale(value: float) -> float:
    """The loss in percent that a value on that scale stands for, at least 0."""
    odds = math.exp(value)
    return min(max((odds * (100.0 + SLACK) - SLACK) / (1.0 + odds), 0.0), 100.0)


def unlike(network: Network) -> list[str]:
    """Why no loss can be told of a network, whatever its answers are, in sentences; empty where nothing speaks against it."""
    place, space = class_output(network.outputs), network.space
    if place is None:
        return ["The network has no output of scores of classes, so that no answer can be right or wrong."]
    found = []
    if not knows_classes(network):
        found.append(f"That an output is scores of classes is not known: {network.outputs[place]}.")
    if space.doubt:
        found.append(f"What the network is fed is doubtful: {space.doubt}.")
    elif space.known == MEASURED:
        found.append(
            "What the network is fed was only measured, and in a wrong input space all images would agree that the file is right;"
            " state it."
        )
    if attentions(network):
        found.append("The network has attention, and all networks that the estimate rests on are convolutional.")
    return found


def beyond(probes: list[Probe], fit: Fit | None = None) -> list[str]:
    """Where answers lie beyond those that the estimate rests on, so that it tells nothing of them, in sentences."""
    fit = fit or shipped()
    found = []
    for kind, one in zip(fit.ranges, probes, strict=True):
        low, high = fit.ranges[kind]
        if one.samples < fit.images[kind]:
            found.append(f"There are {one.samples} {kind} images to tell it from, and the estimate rests on {fit.images[kind]}.")
        if not low <= one.kl <= high:
            way, end = ("farther from", f"at most {high:.2g}") if one.kl > high else ("nearer to", f"at least {low:.2g}")
            found.append(
                f"On {kind} images the answers are {way} the float network's (KL {one.kl:.2g}) than in any case that the estimate"
                f" rests on ({end})."
            )
    low, high = fit.confidence
    sure, known = probes[0].confidence, 0.5 / math.sqrt(probes[0].samples)  # numbers of 0 to 1 deviate by half at most
    if not low - known <= sure <= high + known:
        way, end = ("surer", f"at most {high:.2f}") if sure > high else ("less sure", f"at least {low:.2f}")
        found.append(
            f"The float network is {way} of procedural images (mean confidence {sure:.2f}) than any that the"
            f" estimate rests on ({end})."
        )
    return found


def against(told: Trust, agreement: Agreement) -> list[str]:
    """Where the answers on held-out images cost more than the interval allows, so that not both can be believed."""
    if agreement.cost is None:
        return []
    # of numbers from 0 to 1 with mean m the variance is m (1 - m) at most, which is what the interval of a share supposes
    least = 100 * possible(agreement.cost / 100, agreement.samples)[0]
    if least <= told.high:
        return []
    return [
        f"The file gives another answer on {agreement.differing} of {agreement.samples} held-out images. By the float network's"
        f" own probabilities that costs {agreement.cost:.1f} % of its right answers, {least:.1f} % at least; the answers on other"
        f" images would tell {told.high:.1f} % at most."
    ]


def trust(probes: list[Probe], *, learned: bool, fit: Fit | None = None) -> Trust:
    """The loss expected of a network with such answers; `learned` as in `features`."""
    fit = fit or shipped()
    middle = sum(weight * value for weight, value in zip(fit.weights, features(probes, learned=learned), strict=True))
    return Trust(
        drop=from_scale(middle),
        low=from_scale(middle + fit.below),
        high=from_scale(middle + fit.above),
        level=fit.level,
        cases=fit.cases,
        networks=fit.networks,
    )


@cache
def shipped() -> Fit:
    """The fit that comes with the package."""
    found: dict[str, Any] = json.loads((files("dreamquant.assess") / "trust.json").read_text())
    return Fit(**{name: found[name] for name in Fit.__dataclass_fields__})
