"""How a quantized network answers beside the float one on images that had no part in quantizing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamquant.errors import DataError
from dreamquant.methods import find_method
from dreamquant.network.answers import class_logits, divergence, top1_agreement
from dreamquant.network.graph import Network
from dreamquant.network.outputs import class_output
from dreamquant.network.scores import file_answers, float_answers
from dreamquant.runtime import OnnxRunner
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

PROCEDURAL, DREAMT = 256, 32  # images of each probe


@dataclass(frozen=True)
class Probe:
    """Float against quantized answers on images by one synthesis method.

    `top1` in percent and `kl` in nats are as in `Agreement`. `margin` is the mean distance between the float network's two
    largest scores, and `shift` the root of the mean square of how far the quantized network moves that same distance; both
    are in units of the scores. `confidence` is the float network's mean largest probability.
    """

    method: str
    samples: int
    top1: float
    kl: float
    margin: float
    shift: float
    confidence: float


def stages(calibrated_by: str) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """What the probes are made by: method, number of images and options; the dreamer is another than that of the calibration."""
    dreamer = "rsd" if calibrated_by == "anchored" else "anchored"
    return {
        "procedural": ("fractal", PROCEDURAL, {}),
        "dreamt": (dreamer, DREAMT, find_method("synthesis", dreamer).budget("quick")),
    }


def probe_images(network: Network, *, calibrated_by: str, seed: int) -> list[Samples]:
    """The images of the probes: procedural ones, and dreams by a method other than `calibrated_by`."""
    return [
        synthesize(network, count, method=method, seed=seed, **options)
        for method, count, options in stages(calibrated_by).values()
    ]


def probe(network: Network, runner: OnnxRunner, samples: Samples) -> Probe:
    """Compare what `runner`, the quantized file, answers on samples; the network must score classes."""
    place = class_output(network.outputs)
    if place is None:
        raise DataError(f"the network's outputs are no scores of classes: {'; '.join(map(str, network.outputs))}")
    both = float_answers(network, samples.images), file_answers(network, runner, samples.images)
    expected, actual = (class_logits(network.outputs[place], answers[place]) for answers in both)
    best, second = expected.topk(2, dim=1).indices.unbind(1)
    before, after = (_distance(scores.double(), best, second) for scores in (expected, actual))
    return Probe(
        method=samples.method,
        samples=len(samples),
        top1=top1_agreement(expected, actual),
        kl=divergence(expected, actual),
        margin=before.mean().item(),
        shift=(after - before).square().mean().sqrt().item(),
        confidence=expected.softmax(1).amax(1).mean().item(),
    )


def _distance(scores: Tensor, one: Tensor, other: Tensor) -> Tensor:
    rows = torch.arange(len(scores))
    return scores[rows, one] - scores[rows, other]
