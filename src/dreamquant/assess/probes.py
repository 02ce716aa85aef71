"""How a quantized network answers beside the float one on images that had no part in quantizing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamquant.errors import DataError
from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.network.scores import class_probabilities, divergence, float_scores, top1_agreement
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

PROCEDURAL, DREAMT = 256, 32  # images of each probe
CHUNK = 32


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


def probe(network: Network, run: Callable[[NDArray[np.float32]], NDArray[Any]], samples: Samples) -> Probe:
    """Compare what `run`, the quantized network, answers on samples; the network must score classes."""
    expected = float_scores(network, samples.images)
    probabilities = class_probabilities(network, expected)
    if probabilities is None:
        raise DataError(f"the network's output of shape {tuple(expected.shape[1:])} an image is no scores of classes")
    pieces = torch.split(samples.images.contiguous(), CHUNK)
    actual = torch.from_numpy(np.concatenate([run(piece.numpy()) for piece in pieces]))
    best, second = expected.topk(2, dim=1).indices.unbind(1)
    before, after = (_distance(scores.double(), best, second) for scores in (expected, actual))
    return Probe(
        method=samples.method,
        samples=len(samples),
        top1=top1_agreement(expected, actual),
        kl=divergence(expected, actual),
        margin=before.mean().item(),
        shift=(after - before).square().mean().sqrt().item(),
        confidence=probabilities.max(1).values.mean().item(),
    )


def _distance(scores: Tensor, one: Tensor, other: Tensor) -> Tensor:
    rows = torch.arange(len(scores))
    return scores[rows, one] - scores[rows, other]
