"""What an activation's error does to the scores, and ranges that are narrowed by it.

A range of least error keeps the few largest values of a tensor, though the layers behind may hardly tell them apart, and takes
the levels for them from all other values. How far an error e of a tensor x moves the scores is, to first order, g . e with g the
scores' gradient at x: one run backward tells it of every tensor at once, and a histogram of g over x, image by image, of every
range. Errors of one image are added up before they are squared, so that a clip, which moves many values one way, counts in full,
while roundings to both sides cancel.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.network.graph import Network, first_output, whole_batches
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.histogram import BINS

IMAGES, CHUNK = 64, 8  # looked at in all, and at once
RIVALS = 3  # classes whose distance from the best one is followed
NARROWER, CANDIDATES = 0.94, 75  # each range is so much of the one before; the last is a hundredth of the first


@dataclass(frozen=True)
class Effect:
    """What errors of a tensor's values do: `points` (bins,), the values; `slopes` (images x rivals, bins), summed gradients."""

    points: Tensor
    slopes: Tensor

    def of(self, grids: list[Grid]) -> Tensor:
        """The mean squared distance that each grid moves the scores by, to first order: (len(grids),)."""
        errors = torch.stack([grid.fake(self.points) - self.points for grid in grids], 1)
        return (self.slopes @ errors).square().mean(0)


def together(parts: list[Effect]) -> Effect:
    """What errors of several tensors on one grid do, added up."""
    return Effect(torch.cat([part.points for part in parts]), torch.cat([part.slopes for part in parts], 1))


def narrowed(low: Tensor, high: Tensor, effect: Effect, limit: float, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The widest c [low, high], c <= 1, that moves the scores at most `limit` times as far as the best of them, squared."""
    ratios = [NARROWER**number for number in range(CANDIDATES)]
    found = effect.of([grid_of_range(low * ratio, high * ratio, bits=bits, symmetric=symmetric) for ratio in ratios])
    first = int((found <= limit * found.min()).nonzero()[0])
    return low * ratios[first], high * ratios[first]


def effects(network: Network, nodes: Collection[fx.Node], images: Tensor) -> dict[fx.Node, Effect]:
    """For nodes of a network's graph, what errors of their values on images (N, C, H, W) do to the scores.

    Followed are the distances between an image's largest score and the three next ones. Nodes on which the scores do not depend
    are left out. Raises `ModelError` for scores without a gradient, or with one that is not finite.
    """
    if not nodes:
        return {}
    graph, size = network.graph, network.batch or CHUNK
    pieces = torch.split(whole_batches(images[:IMAGES], network.batch), size)
    limits = _limits(graph, nodes, pieces)
    found: dict[fx.Node, list[Tensor]] = {}
    for piece in pieces:
        recorder = _Recorder(graph, nodes)
        with torch.enable_grad():
            scores = first_output(recorder.run(piece)).flatten(1)
            if not scores.requires_grad:
                raise ModelError("effect_limit asks how far errors move the scores, and the first output has no gradient")
            best = scores.topk(min(RIVALS + 1, scores.shape[1]), dim=1).values.sum(0)
            distances = best[0] - best[1:] if len(best) > 1 else best
            for number, distance in enumerate(distances):
                gradients = torch.autograd.grad(
                    distance, list(recorder.seen.values()), retain_graph=number + 1 < len(distances), allow_unused=True
                )
                for (node, value), gradient in zip(recorder.seen.items(), gradients, strict=True):
                    if gradient is not None:
                        found.setdefault(node, []).append(_histogram(value.detach(), gradient, *limits[node]))
    result = {node: Effect(_centres(*limits[node]), torch.cat(slopes)) for node, slopes in found.items()}
    if not all(bool(effect.slopes.isfinite().all()) for effect in result.values()):
        raise ModelError("effect_limit asks how far errors move the scores, and their gradients are not finite numbers")
    return result


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what some of its nodes compute, so that gradients of it can be taken where they are enabled."""

    def __init__(self, graph: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, Tensor] = {}
        self._nodes = nodes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes and isinstance(value, Tensor):
            if torch.is_grad_enabled() and not value.requires_grad:
                value = value.detach().requires_grad_()
            self.seen[n] = value
        return value


def _limits(graph: fx.GraphModule, nodes: Collection[fx.Node], pieces: tuple[Tensor, ...]) -> dict[fx.Node, tuple[float, float]]:
    """The smallest and largest value that each node computes."""
    found: dict[fx.Node, tuple[float, float]] = {}
    with torch.no_grad():
        for piece in pieces:
            recorder = _Recorder(graph, nodes)
            recorder.run(piece)
            for node, value in recorder.seen.items():
                low, high = (end.item() for end in value.aminmax())
                before = found.get(node, (low, high))
                found[node] = min(low, before[0]), max(high, before[1])
    return found


def _histogram(values: Tensor, gradients: Tensor, low: float, high: float) -> Tensor:
    """The gradients of each image's values, summed up in the bins that the values lie in: (images, bins)."""
    flat = values.flatten(1)
    bins = ((flat - low) * (BINS / max(high - low, 1e-30))).long().clamp_(0, BINS - 1)
    sums = torch.zeros(len(flat), BINS, dtype=torch.float64).scatter_add_(1, bins, gradients.flatten(1).double())
    return sums.float()


def _centres(low: float, high: float) -> Tensor:
    return low + (high - low) / BINS * (torch.arange(BINS) + 0.5)
