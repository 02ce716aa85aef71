"""The numbers that a decision is made by, one a tile."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from dreamquant.assess.agreement import Agreement
from dreamquant.assess.trust import Trust
from dreamquant.flow import Result
from dreamquant.report import figures
from dreamquant.report.verdict import times
from dreamquant.report.words import STAY, counted, megabytes, number, percent, tenths

NO_FIGURE = Markup()


@dataclass(frozen=True)
class Tile:
    """One number and what to know of it."""

    label: str
    value: str
    unit: str = ""
    notes: tuple[str, ...] = ()
    figure: Markup = NO_FIGURE


def tiles(result: Result) -> tuple[Tile, ...]:
    """The numbers that a decision is made by."""
    assessment, proof, latency = result.assessment, result.artifact.verification, result.assessment.latency
    agreement, trust = assessment.agreement, assessment.trust
    ratio, fastest, slowest = times(latency)
    return (
        Tile("Expected loss", "no estimate", notes=tuple(assessment.trust_unknown)) if trust is None else _loss(trust),
        _agreement(agreement),
        Tile(
            "Size",
            percent(assessment.size / assessment.float_size),
            notes=(f"{megabytes(assessment.float_size)} before, {megabytes(assessment.size)} after",),
        ),
        Tile(
            "Latency",
            f"{number(ratio)}{STAY}×",
            "as long" if latency.ratio_high < 1 else "as fast",
            (
                f"{number(latency.a_ms)}{STAY}ms before, {number(latency.b_ms)}{STAY}ms after",
                f"half of {latency.rounds} rounds lie between {number(fastest)}{STAY}× and {number(slowest)}{STAY}×",
                f"batch {latency.batch}, {counted(latency.threads, 'thread')}, {latency.runtime}, {latency.processor}",
            ),
        ),
        Tile(
            "Proof of the file",
            percent(proof.top1_agreement / 100),
            notes=(
                f"of {proof.samples} images have the same top class in ONNX Runtime as in the quantized network it came from",
                f"scores differ by {number(proof.mean_difference, 2)} on average, {number(proof.largest_difference, 2)} at most",
                str(proof.steps),
                *(() if result.artifact.conformity is None else (result.artifact.conformity.sentence(),)),
            ),
        ),
    )


def _agreement(agreement: Agreement) -> Tile:
    if agreement.interval is not None:
        low, high = agreement.interval
        notes: tuple[str, ...] = (
            f"{agreement.samples - agreement.differing} of {agreement.samples} held-out images have the float network's top"
            " class",
            f"so few leave {percent(low / 100)} to {percent(high / 100)} possible",
            f"divergence {number(agreement.kl)}{STAY}nats",
        )
        if agreement.confidence is not None:
            notes += (f"the float network's mean confidence there is {agreement.confidence:.2f}",)
    else:
        notes = (f"{agreement.unit}, on {agreement.samples} held-out images", f"distance {number(agreement.kl)}")
    if len(agreement.outputs) > 1:
        notes += tuple(f"{output.name} ({output.kind}): {output.text}" for output in agreement.outputs)
    return Tile("Agreement", percent(agreement.top1 / 100), notes=notes)


def _loss(trust: Trust) -> Tile:
    low, middle, high = tenths(trust.low), tenths(trust.drop), tenths(trust.high)
    interval = f"{low} to {high} in {trust.level:g}{STAY}% of the cases that it rests on, every network with the same say"
    return Tile(
        "Expected loss",
        middle,
        notes=("of the float network's right answers", interval),
        figure=figures.interval(trust.low, trust.drop, trust.high, f"{middle}, {low} to {high}"),
    )
