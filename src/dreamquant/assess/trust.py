"""How much accuracy a quantized network is expected to lose, told without a single labelled image, and how far to believe it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from dreamquant.assess.probes import Probe

SLACK = 0.25  # percent: smaller losses are not told apart, nor are they by the images of a test set
SMALLEST_KL = 1e-4


@dataclass(frozen=True)
class Trust:
    """The expected loss: how many percent of what the float network gets right the quantized one gets wrong, on balance.

    Of 70.0 % top-1, a `drop` of 2 leaves 68.6 %. The interval from `low` to `high` held the true loss in `level` percent of the
    cases when the network in question was left out of the fit. It rests on `probes`: the quantized network's answers beside the
    float one's on images that had no part in quantizing it, set against losses measured with labels in `cases` quantizations of
    `networks` networks. `warnings` say where this network or this result is unlike those, so that it must not be trusted.
    """

    drop: float
    low: float
    high: float
    level: float
    cases: int
    networks: int
    probes: list[Probe]
    warnings: list[str] = field(default_factory=list)


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


def trust(probes: list[Probe], *, learned: bool, attention: bool = False, fit: Fit | None = None) -> Trust:
    """The loss expected of a network with such answers; `learned` as in `features`, `attention` if it is a transformer."""
    fit = fit or shipped()
    middle = sum(weight * value for weight, value in zip(fit.weights, features(probes, learned=learned), strict=True))
    warnings = []
    for kind, probe in zip(fit.ranges, probes, strict=True):
        _, high = fit.ranges[kind]
        if probe.kl > high:
            warnings.append(
                f"on {kind} images the answers are farther from the float network's (KL {probe.kl:.3g}) than in any case that"
                f" the estimate rests on (at most {high:.3g})"
            )
    if attention:
        warnings.append("the network has attention, and all networks that the estimate rests on are convolutional")
    return Trust(
        drop=from_scale(middle),
        low=from_scale(middle + fit.below),
        high=from_scale(middle + fit.above),
        level=fit.level,
        cases=fit.cases,
        networks=fit.networks,
        probes=probes,
        warnings=warnings,
    )


@cache
def shipped() -> Fit:
    """The fit that comes with the package."""
    found: dict[str, Any] = json.loads((files("dreamquant.assess") / "trust.json").read_text())
    return Fit(**{name: found[name] for name in Fit.__dataclass_fields__})
