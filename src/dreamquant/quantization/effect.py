"""What an activation's error does to the answers, and ranges that are narrowed by it.

A range of least error keeps the few largest values of a tensor, though the layers behind may hardly tell them apart, and takes
the levels for them from all other values. How far an error e of a tensor x moves the answers is, to first order, g . e with g
their gradient at x: one run backward tells it of every tensor at once, and a histogram of g over x, image by image, of every
range. Errors of one image are added up before they are squared, so that a clip, which moves many values one way, counts in full,
while roundings to both sides cancel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError
from dreamquant.mapped import put_away
from dreamquant.network.answers import margins, spread, spreads
from dreamquant.network.gradients import look_at_gradients
from dreamquant.network.graph import Network, by_image, in_pieces, output_nodes
from dreamquant.network.interpreter import interpret
from dreamquant.network.live import at_once, working_bytes
from dreamquant.network.notes import is_tensor
from dreamquant.network.opaque import is_opaque, stops_gradient
from dreamquant.network.outputs import SHAPE, VALUES, Output
from dreamquant.network.scores import float_answers
from dreamquant.quantization.grid import Grid, block, grid_of_range
from dreamquant.quantization.histogram import BINS

IMAGES, CHUNK = 64, 8  # looked at in all, and at once
NARROWER, CANDIDATES = 0.94, 75  # each range is so much of the one before; the last is a hundredth of the first


@dataclass(frozen=True)
class Effect:
    """What errors of a tensor's values do: `points` (bins,), the values; `slopes` (images x margins, bins), summed gradients."""

    points: Tensor
    slopes: Tensor

    def moves(self, grids: list[Grid]) -> Tensor:
        """The squared distances that each grid moves the answers by, to first order: (images x margins, len(grids))."""
        errors = torch.stack([grid.fake(self.points) - self.points for grid in grids], 1)
        return (self.slopes @ errors).square()

    def of(self, grids: list[Grid]) -> Tensor:
        """The mean of `moves`: (len(grids),)."""
        return self.moves(grids).mean(0)


def together(parts: list[Effect]) -> Effect:
    """What errors of several tensors on one grid do, added up."""
    return Effect(torch.cat([part.points for part in parts]), torch.cat([part.slopes for part in parts], 1))


def narrowed(low: Tensor, high: Tensor, effect: Effect, limit: float, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The widest c [low, high], c <= 1, that moves the answers at most `limit` times as far as the best of them, squared."""
    ratios = [NARROWER**number for number in range(CANDIDATES)]
    found = effect.of([grid_of_range(low * ratio, high * ratio, bits=bits, symmetric=symmetric) for ratio in ratios])
    first = int((found <= limit * found.min()).nonzero()[0])
    return low * ratios[first], high * ratios[first]


def effects(network: Network, nodes: Collection[fx.Node], images: Tensor) -> dict[fx.Node, Effect]:
    """For nodes of a network's graph, what errors of their values on images (N, C, H, W) do to the answers.

    Followed are the `margins` of all outputs: of classes the distances between an image's largest score and the three next ones.
    What enters an operator that no gradient passes is followed as an answer of numbers. Nodes on which the answers do not depend
    are left out. Raises `ModelError` for answers without a gradient, or with one that is
    not finite.
    """
    if not nodes:
        return {}
    graph = network.graph
    pieces = in_pieces(images[:IMAGES], network.batch, at_once(network, CHUNK, kept=True), network.device)
    limits = _limits(graph, nodes, pieces)
    variances = spreads(network.outputs, float_answers(network, images[:IMAGES]))
    slopes: dict[fx.Node, list[Tensor]] = {}

    def look(node: fx.Node, value: Tensor, gradient: Tensor) -> None:
        slopes.setdefault(node, []).append(_histogram(value, gradient, *limits[node]))

    ends = _ends(graph.graph)
    for piece in pieces:

        def asked(result: Any, before: Mapping[fx.Node, Tensor], count: int = len(piece)) -> list[Tensor]:
            return _followed(network, result, variances, count) + _before(list(before.values()))

        if not look_at_gradients(graph, piece, nodes, asked, look, ends=ends, size=working_bytes()):
            raise ModelError("effect_limit asks how far errors move the answers, and they have no gradient")
    result = {
        node: Effect(_centres(*limits[node], network.device), torch.cat(slopes.pop(node))) for node in limits if node in slopes
    }
    put_away()
    if not all(bool(effect.slopes.isfinite().all()) for effect in result.values()):
        raise ModelError("effect_limit asks how far errors move the answers, and their gradients are not finite numbers")
    return result


def _followed(network: Network, result: Any, variances: list[float], count: int) -> list[Tensor]:
    """The margins of all outputs that have a gradient, each summed over the images."""
    answers = zip(network.outputs, by_image(result, network.outputs, count), variances, strict=True)
    found = [
        margins(output, value, variance, seed)
        for seed, (output, value, variance) in enumerate(answers)
        if value.requires_grad and output.axis is not None
    ]
    return [margin for one in found for margin in one.sum(0)]


def _ends(graph: fx.Graph) -> set[fx.Node]:
    """The last tensors on which a gradient can be taken, in front of operators that have none and lead to the outputs."""
    found: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if is_opaque(node)] + [one for one in output_nodes(graph) if stops_gradient(one)]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if not stops_gradient(source) and is_tensor(source):
                found.add(source)
            elif not is_opaque(source):
                waiting.append(source)
    return found


def _before(values: list[Tensor]) -> list[Tensor]:
    """The margins of tensors that lead into such operators."""
    found = []
    for seed, value in enumerate(one for one in values if one.requires_grad and one.dim() > 1):
        output = Output("", VALUES, SHAPE, "", 0, tuple(value.shape[1:]))
        found += list(margins(output, value, spread(output, value.detach()), seed).sum(0))
    return found


def _limits(graph: fx.GraphModule, nodes: Collection[fx.Node], pieces: Iterable[Tensor]) -> dict[fx.Node, tuple[float, float]]:
    """The smallest and largest value that each node computes."""
    found: dict[fx.Node, tuple[float, float]] = {}

    def after(node: fx.Node, value: Any) -> Any:
        if node in nodes and isinstance(value, Tensor):
            low, high = (end.item() for end in value.aminmax())
            before = found.get(node, (low, high))
            found[node] = min(low, before[0]), max(high, before[1])
        return value

    with torch.no_grad():
        for piece in pieces:
            interpret(graph, piece, after=after)
    return found


def _histogram(values: Tensor, gradients: Tensor, low: float, high: float) -> Tensor:
    """The gradients of each image's values, summed up in the bins that the values lie in: (images, bins)."""
    flat, slopes = values.flatten(1), gradients.flatten(1)
    sums = flat.new_zeros(len(flat), BINS, dtype=torch.float64)
    for part, slope in zip(torch.split(flat, block(flat), 1), torch.split(slopes, block(flat), 1), strict=True):
        bins = (part - low).mul_(BINS / max(high - low, 1e-30)).long().clamp_(0, BINS - 1)
        sums.scatter_add_(1, bins, slope.double())
    return sums.float()


def _centres(low: float, high: float, device: torch.device) -> Tensor:
    return low + (high - low) / BINS * (torch.arange(BINS, device=device) + 0.5)
