"""What a run came to, in one sentence made of its numbers, and what speaks against believing them."""

from __future__ import annotations

from dataclasses import dataclass

from dreamquant.assess.agreement import Agreement
from dreamquant.assess.assess import Assessment
from dreamquant.assess.dreams import DreamMeasures
from dreamquant.assess.latency import Latency
from dreamquant.assess.trust import Trust
from dreamquant.flow import Result
from dreamquant.network.answers import UNITS
from dreamquant.network.input_space import InputSpace
from dreamquant.network.outputs import DENSE, FEATURES, MULTILABEL, REGIONS, SEQUENCE, VALUES
from dreamquant.report.words import number, percent, sentence, tenths

GOOD, OPEN, BAD = "good", "open", "bad"
LITTLE, MUCH, RUIN = 1.0, 5.0, 20.0  # percent of the float network's right answers lost
NOTHING = 0.05  # percent; less is not told from none
NEAR, HALF = 90.0, 50.0  # percent of agreement
UNSURE = 0.5  # a mean confidence below it


@dataclass(frozen=True)
class Verdict:
    """One sentence on what is lost, another on what is gained; `tone` is `good`, `bad`, or `open`: for the reader to decide."""

    tone: str
    lost: str
    gained: str


def verdict(assessment: Assessment, space: InputSpace | None = None) -> Verdict:
    """What stands on top of a report: the estimate and the answers on held-out images as one statement, or the answers alone.

    Where no BatchNorm had its say on the input `space`, that all of it rests on this space is said too.
    """
    trust, agreement = assessment.trust, assessment.agreement
    tone, lost = _of_agreement(agreement) if trust is None else _of_both(trust, agreement)
    if space is not None and not space.checked:
        lost += f" All this holds only if the network is fed {space.numbers()}, which nothing in it confirms."
    elsewhere = f" in ONNX Runtime; nothing is known of {assessment.made_for}, which it is for" if assessment.made_for else ""
    size = percent(assessment.size / assessment.float_size)
    gained = f"The file has {size} of the size and {speed(assessment.latency)}{elsewhere}."
    return Verdict(tone, lost, gained)


def _of_both(trust: Trust, agreement: Agreement) -> tuple[str, str]:
    """The estimate, and what the answers on held-out images mean beside it, so that neither seems to deny the other."""
    tone, lost = _of_trust(trust)
    images = f"{agreement.samples} held-out images{_confident(agreement)}"
    if agreement.differing == 0:
        same = f"{lost}; the file gives the float network's answer on all {images}"
        return tone, f"{same}, but these are like those that it was calibrated on." if trust.drop >= LITTLE else f"{same}."
    differ = f"{lost}; the file gives another answer on {agreement.differing} of {images}"
    if not agreement.sure:
        return tone, f"{differ}, but the float network was not sure of its own there, so that they tell little."
    return tone, f"{differ}, and the float network was sure of its own there, but so few are within what the estimate allows."


def _confident(agreement: Agreement) -> str:
    return "" if agreement.confidence is None else f" (its mean confidence: {agreement.confidence:.2f})"


def _of_trust(trust: Trust) -> tuple[str, str]:
    about = f"about {tenths(trust.drop)} of the float network's right answers"
    if trust.drop < NOTHING:
        about = "next to none of the float network's right answers"
    possible = f"and {tenths(trust.high)} are possible"
    if trust.drop >= RUIN:
        return BAD, f"Do not use this file as it is: {about} are expected to be lost"
    if trust.drop >= MUCH:
        return BAD, f"Much is lost: {about} by the estimate, {possible}"
    if trust.high >= RUIN:
        found = f"Measure before you use this file: {about} are expected to be lost, but the estimate is so wide that"
        return OPEN, f"{found} {tenths(trust.high)} are possible"
    if trust.drop >= LITTLE:
        return OPEN, f"Some accuracy is lost: {about} by the estimate, {possible}"
    if trust.high >= LITTLE:
        return OPEN, f"Little should be lost, though that is not certain: {about} by the estimate, {possible}"
    return GOOD, f"Little is lost: {about} by the estimate; more than {tenths(trust.high)} would be a surprise"


def _of_agreement(agreement: Agreement) -> tuple[str, str]:
    if agreement.top1 == 100 and agreement.kind != VALUES:
        found = f"The file gives the float network's answer on all {agreement.samples} held-out images"
        return OPEN, f"{found}; what accuracy it has is not estimated."
    found = _another(agreement)
    if agreement.top1 < NEAR and not agreement.sure:
        return OPEN, f"{sentence(found)}, of which that one was not sure; what accuracy that costs is not estimated."
    if agreement.top1 < HALF:
        return BAD, f"Do not use this file as it is: {found}."
    if agreement.top1 < NEAR:
        return BAD, f"A loss of accuracy must be expected: {found}."
    return OPEN, f"{sentence(found)}; what accuracy that costs is not estimated."


def _another(agreement: Agreement) -> str:
    """How far the answers are the float network's, by the kind of the main output."""
    differ, dreams = percent(1 - agreement.top1 / 100), f"{agreement.samples} held-out images"
    if agreement.kind == VALUES and agreement.unit == UNITS[VALUES]:
        return f"its errors are {differ} of what the float network's answers to {dreams} differ by"
    if agreement.kind == FEATURES:
        return f"its embeddings have a mean cosine of {number(agreement.top1 / 100)} with the float network's on {dreams}"
    if agreement.kind == REGIONS:
        return f"it finds other boxes than the float network on {dreams}: F1 {percent(agreement.top1 / 100)}"
    parts = {VALUES: "numbers", MULTILABEL: "labels", DENSE: "pixels", SEQUENCE: "time steps"}
    what = f"the {parts[agreement.kind]} of " if agreement.kind in parts else ""
    return f"it gives another answer than the float network on {differ} of {what}{dreams}"


def speed(latency: Latency) -> str:
    """How fast a file is beside the float one; no difference is claimed that three quarters of the rounds do not show."""
    ratio, _, _ = times(latency)
    if latency.ratio_low > 1:
        return f"runs {number(ratio)} times as fast"
    if latency.ratio_high < 1:
        return f"takes {number(ratio)} times as long"
    return "runs about as fast"


def times(latency: Latency) -> tuple[float, float, float]:
    """How many times as fast a file is as the float one, or as long as it takes where it is the slower; and the quartiles."""
    if latency.ratio_high < 1:
        return 1 / latency.ratio, 1 / latency.ratio_high, 1 / latency.ratio_low
    return latency.ratio, latency.ratio_low, latency.ratio_high


def cautions(result: Result, measures: DreamMeasures | None) -> list[str]:
    """When not to trust a report: what its numbers do not say, and what about this run is out of the ordinary."""
    assessment, proof = result.assessment, result.artifact.verification
    found = [
        "Dreams are no data: they show what the network remembers, not what it will meet. Where there are labelled images,"
        " even a few hundred, measure the file on them.",
        _about_agreement(assessment.agreement),
        *_about_input(result.network.space),
    ]
    if not assessment.fast:
        found.insert(0, f"The file is {assessment.too_slow()}.")
    if result.fastest is not None:
        found.append(f"What is left in float was found by timing, another run may find other tensors: {result.fastest}.")
    found += [f"{sentence(str(output))}." for output in result.network.outputs if not output.certain]
    found += _about_dreams(measures)
    if result.student.bits.weights < 8:
        found.append("Fewer than 8 bits make a file small, not fast: ONNX Runtime computes them in more bits on a processor.")
    if assessment.float_layers:
        found.append(f"Left in float, and as large and slow as before: {', '.join(assessment.float_layers)}.")
    if not proof.steps.same:
        found.append(
            f"The file says what was measured, but ONNX Runtime does not compute it so at every layer: {proof.steps}. Its outputs"
            f" are near enough to pass ({percent(proof.top1_agreement / 100)} of the top classes stay)."
        )
    found.append(
        f"Times are of one machine, {assessment.latency.processor}, on noise, one file after the other; another processor"
        " may order them differently."
    )
    return found


def _about_input(space: InputSpace) -> list[str]:
    if space.doubt:
        return [f"What the network is fed was forced against what speaks for another: {space.doubt}."]
    if space.checked:
        return []
    how = "stated" if space.known == "stated" else f"found in the {space.known}"
    return [
        f"What the network is fed ({space.numbers()}) is as it was {how}: it has no BatchNorm that could confirm it. If that is"
        " wrong, so is every figure here."
    ]


def _about_agreement(agreement: Agreement) -> str:
    counted = f"Agreement was counted on {agreement.samples} held-out images"
    if agreement.interval is None:
        return f"{counted}, and other images are another matter."
    low, high = (percent(end / 100) for end in agreement.interval)
    return f"{counted}. So few leave {low} to {high} possible for images of this kind, and other images are another matter."


def _about_dreams(measures: DreamMeasures | None) -> list[str]:
    classes = None if measures is None else measures.classes
    if measures is None or classes is None:
        return []
    found = []
    if classes.confidence < UNSURE:
        found.append(
            f"The network is unsure of its own dreams: a mean confidence of {number(classes.confidence, 2)}. Agreement on images"
            " that lie between classes says less."
        )
    if classes.distinct < min(classes.classes, measures.images) / 2:
        found.append(f"The dreams show {classes.distinct} of {classes.classes} classes; of the others nothing was seen.")
    return found
