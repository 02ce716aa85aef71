"""What a network answers: its first output on images, the probabilities of classes, and how near two networks' answers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamquant.network.graph import Network, output_nodes
from dreamquant.network.operators import SOFTMAX, is_call


def float_scores(network: Network, images: Tensor, *, chunk: int = 64) -> Tensor:
    """The float network's first output on images (N, C, H, W)."""
    with torch.no_grad():
        return torch.cat([network(piece) for piece in torch.split(images, chunk)])


def class_probabilities(network: Network, scores: Tensor) -> Tensor | None:
    """Probabilities (N, classes) from the network's scores, which are those already where it ends in a softmax; None for
    outputs that are no scores of at least two classes."""
    if not _of_classes(scores.shape):
        return None
    return scores if is_call(output_nodes(network.graph.graph)[0], SOFTMAX) else scores.softmax(1)


def scores_classes(network: Network) -> bool:
    """Whether the network's first output is scores of at least two classes, so that answers can be right or wrong."""
    return _of_classes(output_nodes(network.graph.graph)[0].meta["shape"])


def _of_classes(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[1] > 1


def divergence(expected: Tensor, actual: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the softmax of `actual` scores from that of `expected` ones, in nats.

    Both are (N, classes, ...): class scores lie along axis 1. The sums are in double precision: eight bits cost less than
    single precision can tell from nothing.
    """
    one, other = (scores.double().log_softmax(1) for scores in (expected, actual))
    parts = torch.where(one.isneginf(), 0.0, one.exp() * (one - other))
    return parts.sum(1).mean().item()


def top1_agreement(expected: Tensor, actual: Tensor) -> float:
    """Percent of the images (and places) where both scores (N, classes, ...) have their largest in the same class."""
    return 100.0 * (expected.argmax(1) == actual.argmax(1)).double().mean().item()
