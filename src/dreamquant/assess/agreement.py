"""How near a quantized network is to the float one, with no labels: agreement, distance, and which layers are hurt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from dreamquant.network.answers import UNITS, class_logits, distance, is_exclusive, possible, relative_error, spreads, unit
from dreamquant.network.answers import agreement as agree
from dreamquant.network.graph import in_pieces
from dreamquant.network.live import at_once
from dreamquant.network.operators import PRODUCTS, WEIGHTED, is_call
from dreamquant.network.outputs import CLASSES, FEATURES, REGIONS, VALUES, Output, main_output
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import CHUNK, Chunks, walk

HALF = 0.5  # of an answer


@dataclass(frozen=True)
class Agreement:
    """Float network against quantized one on images that did not calibrate it, by the main output; `outputs` has them all.

    `top1` is a percentage of `unit`: of an output of classes the images with the same top class, of another `kind` what that is
    counted in. `kl` is the distance: of classes the mean Kullback-Leibler divergence of the quantized softmax from the float
    one, in nats, of others that of their kind (`network.answers`).

    Of classes, `confidence` is the float network's mean largest probability on these images, and `cost` what the other answers
    would lose of its right ones if its probabilities were true, in percent: an answer that it was not sure of costs little.
    """

    samples: int
    top1: float
    kl: float
    kind: str = CLASSES
    unit: str = UNITS[CLASSES]
    outputs: list[OutputAgreement] = field(default_factory=list)
    confidence: float | None = None
    cost: float | None = None

    @property
    def differing(self) -> int:
        """The images with another answer; of classes only."""
        return round(self.samples * (1 - self.top1 / 100))

    @property
    def interval(self) -> tuple[float, float] | None:
        """What so few images leave possible of `top1`, in percent; None where it is no share of images."""
        return _interval(self.top1, self.samples) if self.kind == CLASSES else None

    @property
    def sure(self) -> bool:
        """Whether the float network was sure of the answers that the quantized one does not give: each costs half an answer."""
        return self.cost is None or self.cost > HALF * (100 - self.top1)


@dataclass(frozen=True)
class OutputAgreement:
    """The same of one output; `known` and `why` say how its kind is known, and `counted` of how many answers (images, labels,
    pixels, steps, or numbers) it tells. `relative_error`, for values only, is the root mean square of the errors over that of
    what the float network's answers to different images differ by."""

    name: str
    shape: tuple[int, ...]
    kind: str
    known: str
    why: str
    unit: str
    agreement: float
    distance: float
    counted: int
    relative_error: float | None

    @property
    def text(self) -> str:
        """What is told of it, in one line."""
        if self.relative_error is not None:
            decibels = "" if self.relative_error == 0 else f" ({-20 * math.log10(self.relative_error):.1f} dB)"
            return f"errors are {100 * self.relative_error:.2f} % of what the float network's answers differ by{decibels}"
        if self.kind == FEATURES:
            return f"mean cosine {self.agreement / 100:.5f} with the float network's"
        if self.kind == REGIONS:
            return f"F1 {self.agreement:.1f} % of boxes against the float network's, distance {self.distance:.4f}"
        counted = ""
        if self.kind == CLASSES:
            low, high = _interval(self.agreement, self.counted)
            counted = f" ({self.counted * self.agreement / 100:.0f} of {self.counted}, {low:.0f} to {high:.0f} %)"
        far = "" if self.kind == VALUES else f", KL {self.distance:.4f}"
        return f"{self.agreement:.1f} % {self.unit}{counted} with the float network{far}"


@dataclass(frozen=True)
class LayerError:
    """One layer's signal-to-quantization-noise ratio, in decibels, with everything before it quantized too."""

    layer: str
    sqnr: float


def agreement(outputs: Sequence[Output], expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Agreement:
    """Compare the answers (N, ...) of the float network and of the quantized one, output by output."""
    variances = spreads(outputs, expected)
    found = [_of_output(*one) for one in zip(outputs, expected, actual, variances, strict=True)]
    place = main_output(outputs)
    main = found[place]
    told = Agreement(len(expected[0]), main.agreement, main.distance, main.kind, main.unit, found)
    if main.kind != CLASSES:
        return told
    sure, cost = _confidence_and_cost(*(class_logits(outputs[place], answers[place]) for answers in (expected, actual)))
    return replace(told, confidence=sure, cost=cost)


def _confidence_and_cost(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """The mean probability of the float network's own answers, and how many percent less it gives the quantized network's."""
    probabilities = expected.double().softmax(1)
    own, other = (probabilities.gather(1, scores.argmax(1, keepdim=True)).mean().item() for scores in (expected, actual))
    return own, 100 * max(0.0, 1 - other / own)


def _interval(percent: float, count: int) -> tuple[float, float]:
    low, high = possible(percent / 100, count)
    return 100 * low, 100 * high


def _of_output(output: Output, expected: Tensor, actual: Tensor, variance: float) -> OutputAgreement:
    counted = expected.numel() // (expected.shape[output.places] if is_exclusive(output, expected) else 1)
    return OutputAgreement(
        name=output.name,
        shape=output.shape,
        kind=output.kind,
        known=output.known,
        why=output.why,
        unit=unit(output),
        agreement=agree(output, expected, actual),
        distance=distance(output, expected, actual, variance),
        counted=counted,
        relative_error=relative_error(expected, actual) if output.kind == VALUES and output.form != "numbers" else None,
    )


def layer_errors(student: Student, images: Tensor) -> list[LayerError]:
    """SQNR of every layer's output on images (N, C, H, W), in the order of the graph."""
    found: dict[str, Tensor] = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        if is_call(node, WEIGHTED | PRODUCTS):
            for q, e in zip(quantized, exact, strict=True):
                sums = torch.stack([e.double().square().sum(), (q - e).double().square().sum()])
                found[node.name] = found[node.name] + sums if node.name in found else sums

    network = student.network
    for piece in in_pieces(images, network.batch, at_once(network, CHUNK)):
        walk(network, piece, after=after)
    ratios = {name: (signal / noise.clamp(min=1e-30)) for name, (signal, noise) in found.items()}
    return [LayerError(name, 10.0 * torch.log10(ratio).item()) for name, ratio in ratios.items()]
