"""How near a quantized network is to the float one, with no labels: agreement, divergence, and which layers are hurt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dreamquant.network.graph import whole_batches
from dreamquant.network.operators import PRODUCTS, WEIGHTED, is_call
from dreamquant.network.scores import divergence, top1_agreement
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import Chunks, walk


@dataclass(frozen=True)
class Agreement:
    """Float network against quantized one on images that did not calibrate it.

    `top1` in percent; `kl` is the mean Kullback-Leibler divergence of the quantized softmax from the float one, in nats.
    """

    samples: int
    top1: float
    kl: float


@dataclass(frozen=True)
class LayerError:
    """One layer's signal-to-quantization-noise ratio, in decibels, with everything before it quantized too."""

    layer: str
    sqnr: float


def agreement(expected: Tensor, actual: Tensor) -> Agreement:
    """Compare scores of the float network and of the quantized one; class scores lie along axis 1."""
    return Agreement(len(expected), top1_agreement(expected, actual), divergence(expected, actual))


def layer_errors(student: Student, images: Tensor) -> list[LayerError]:
    """SQNR of every layer's output on images (N, C, H, W), in the order of the graph."""
    found: list[LayerError] = []

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        if not is_call(node, WEIGHTED | PRODUCTS):
            return
        signal = sum(value.double().square().sum() for value in exact)
        noise = sum((q - e).double().square().sum() for q, e in zip(quantized, exact, strict=True))
        ratio = torch.as_tensor(signal) / torch.as_tensor(noise).clamp(min=1e-30)
        found.append(LayerError(node.name, 10.0 * torch.log10(ratio).item()))

    batch = student.network.batch
    walk(student.network.graph, whole_batches(images, batch), chunk=batch or 32, after=after)
    return found
