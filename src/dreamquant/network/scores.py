"""What a network answers to images: all its outputs, and the probabilities of classes where it has an output of these."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamquant.mapped import Pieces
from dreamquant.network.answers import class_logits, divergence, top1_agreement
from dreamquant.network.graph import Network, by_image, joined, output_nodes, whole_batches
from dreamquant.network.live import at_once
from dreamquant.network.opaque import in_reach
from dreamquant.network.outputs import class_output
from dreamquant.runtime import OnnxRunner

__all__ = [
    "class_probabilities",
    "divergence",
    "file_answers",
    "float_answers",
    "knows_classes",
    "scores_classes",
    "top1_agreement",
]

MOST, FEW = 32, 4  # images run at once, here and in ONNX Runtime, which is no faster on more


def float_answers(network: Network, images: Tensor) -> list[Tensor]:
    """All outputs of the float network on images (N, C, H, W), each (N, ...)."""
    return joined(network.answers, Pieces(images, at_once(network, MOST)))


def file_answers(network: Network, runner: OnnxRunner, images: Tensor) -> list[Tensor]:
    """All outputs, each (N, ...), of a file that was written from the network, on images (N, C, H, W)."""

    def run(piece: Tensor) -> list[Tensor]:
        filled = whole_batches(piece, runner.batch)
        values = [torch.from_numpy(np.ascontiguousarray(value)) for value in runner.all(filled.numpy())]
        return [value[: len(piece)] for value in by_image(values, network.outputs, len(filled))]

    return joined(run, Pieces(images.contiguous(), runner.batch or at_once(network, FEW)))


def class_probabilities(network: Network, answers: list[Tensor]) -> Tensor | None:
    """Probabilities (N, classes) of the first output of classes; None for a network without one."""
    place = class_output(network.outputs)
    return None if place is None else class_logits(network.outputs[place], answers[place]).softmax(1)


def scores_classes(network: Network) -> bool:
    """Whether an output is taken for scores of classes, and a gradient leads from it to the images: a dreamer can aim at it."""
    place, graph = class_output(network.outputs), network.graph.graph
    return place is not None and output_nodes(graph)[place] in in_reach(graph)


def knows_classes(network: Network) -> bool:
    """Whether more than its shape says so: only then are answers told to be right or wrong."""
    place = class_output(network.outputs)
    return place is not None and network.outputs[place].certain
