"""What a run came to, in one sentence made of its numbers, and what speaks against believing them."""

from __future__ import annotations

from dataclasses import dataclass

from dreamquant.assess.agreement import Agreement
from dreamquant.assess.assess import Assessment
from dreamquant.assess.dreams import DreamMeasures
from dreamquant.assess.latency import Latency
from dreamquant.assess.trust import Trust
from dreamquant.network.answers import UNITS
from dreamquant.network.graph import Network
from dreamquant.network.input_space import InputSpace
from dreamquant.network.outputs import CLASSES, DENSE, FEATURES, MULTILABEL, REGIONS, SEQUENCE, VALUES, class_output
from dreamquant.network.scores import knows_classes
from dreamquant.report.words import number, percent, sentence, tenths
from dreamquant.run import Result

GOOD, OPEN, BAD = "good", "open", "bad"
LITTLE, MUCH, RUIN = 1.0, 5.0, 20.0  # percent of the float network's right answers lost
NOTHING = 0.05  # percent; less is not told from none
NEAR, HALF = 90.0, 50.0  # percent of agreement
DEVIATIONS = 1.96  # of the normal distribution: 95 percent
SURE = 0.5  # nats that each image with another answer costs at least, if the float network was sure of its own
UNSURE = 0.5  # a mean confidence below it


@dataclass(frozen=True)
class Verdict:
    """One sentence on what is lost, another on what is gained; `tone` is `good`, `bad`, or `open`: for the reader to decide."""

    tone: str
    lost: str
    gained: str


def verdict(assessment: Assessment) -> Verdict:
    """What stands on top of a report: the estimate, unless the answers on dreams speak against it."""
    trust, agreement = assessment.trust, assessment.agreement
    tone, lost = _of_agreement(agreement) if trust is None else _of_trust(trust)
    if trust is not None and agreement.top1 < NEAR and sure(agreement) and trust.drop < RUIN:
        tone, lost = BAD, _despite(agreement, trust)
    gained = f"The file has {percent(assessment.size / assessment.float_size)} of the size and {speed(assessment.latency)}."
    return Verdict(tone, lost, gained)


def sure(agreement: Agreement) -> bool:
    """Whether the float network was sure of the answers that the quantized one does not give: such images diverge much."""
    return agreement.kind != CLASSES or agreement.kl > SURE * (1 - agreement.top1 / 100)


def _despite(agreement: Agreement, trust: Trust) -> str:
    what = "Do not use this file as it is" if agreement.top1 < HALF else "Measure before you use this file"
    return f"{what}: {_another(agreement)}, though the estimated loss is {tenths(trust.drop)}."


def _of_trust(trust: Trust) -> tuple[str, str]:
    about = f"about {tenths(trust.drop)} of the float network's right answers"
    if trust.drop < NOTHING:
        about = "next to none of the float network's right answers"
    possible = f"and {tenths(trust.high)} are possible"
    if trust.drop >= RUIN:
        return BAD, f"Do not use this file as it is: {about} are expected to be lost."
    if trust.warnings:
        found = (
            f"Measure before you use this file: {about} are expected to be lost, but the estimate is not made for such a case."
        )
        return BAD if trust.drop >= MUCH else OPEN, found
    if trust.drop >= MUCH:
        return BAD, f"Much is lost: {about} by the estimate, {possible}."
    if trust.high >= RUIN:
        found = f"Measure before you use this file: {about} are expected to be lost, but the estimate is so wide that"
        return OPEN, f"{found} {tenths(trust.high)} are possible."
    if trust.drop >= LITTLE:
        return OPEN, f"Some accuracy is lost: {about} by the estimate, {possible}."
    if trust.high >= LITTLE:
        return OPEN, f"Little should be lost, though that is not certain: {about} by the estimate, {possible}."
    return GOOD, f"Little is lost: {about} by the estimate; more than {tenths(trust.high)} would be a surprise."


def _of_agreement(agreement: Agreement) -> tuple[str, str]:
    if agreement.top1 == 100 and agreement.kind != VALUES:
        found = f"The file gives the float network's answer on all {agreement.samples} held-out images"
        return OPEN, f"{found}; what accuracy it has is not estimated."
    found = _another(agreement)
    if agreement.top1 < NEAR and not sure(agreement):
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


def possible(agreement: Agreement) -> tuple[float, float]:
    """The shares (of 1) of images that agree which so few images leave possible: Wilson's interval, 95 percent."""
    count, share, z = agreement.samples, agreement.top1 / 100, DEVIATIONS
    middle = share + z * z / (2 * count)
    width = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return max(0.0, (middle - width) / (1 + z * z / count)), min(1.0, (middle + width) / (1 + z * z / count))


def no_trust(network: Network) -> str:
    """Why no loss of accuracy is told."""
    if knows_classes(network):
        return "This run was asked for no estimate."
    place = class_output(network.outputs)
    if place is not None:
        told = sentence(str(network.outputs[place]))
        return f"That an output is scores of classes is not known, so that no loss is estimated. {told}."
    return "The network has no output of scores of classes, so that no answer can be right or wrong."


def cautions(result: Result, measures: DreamMeasures | None) -> list[str]:
    """When not to trust a report: what its numbers do not say, and what about this run is out of the ordinary."""
    assessment, proof = result.assessment, result.artifact.verification
    found = [
        "Dreams are no data: they show what the network remembers, not what it will meet. Where there are labelled images,"
        " even a few hundred, measure the file on them.",
        _about_agreement(assessment.agreement),
        *_about_input(result.network.space),
    ]
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
    counted = f"Agreement was counted on {agreement.samples} dreams"
    if agreement.kind != CLASSES:
        return f"{counted}, and other images are another matter."
    low, high = possible(agreement)
    return (
        f"{counted}. So few leave {percent(low)} to {percent(high)} possible for dreams of this kind, and other images are"
        " another matter."
    )


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
