"""What a float network answers: its first output on images, and the probabilities of classes where it scores some."""

from __future__ import annotations

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
    if scores.dim() != 2 or scores.shape[1] < 2:
        return None
    return scores if is_call(output_nodes(network.graph.graph)[0], SOFTMAX) else scores.softmax(1)
