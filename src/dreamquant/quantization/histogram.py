"""Histograms that stand for many values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 4096
EXACT = 2**24  # float32, in which torch counts, knows no 2^24 + 1
FEW = 2**16  # values that are kept as they are where they come in pieces
SMALLEST_REACH = 1e-30


@dataclass(frozen=True)
class Values:
    """Values in groups, as functions of ranges look at them: all of them, or a histogram that stands for more than memory holds.

    `points` and their `weights` (groups, n); `lows` and `highs` (groups, images), the smallest and largest value of each image.
    Where there is a `reach`, the one group's points are the centres of `BINS` equal cells of [-reach, 0] and of [0, reach], and
    after them 0 itself, which the cells do not count.
    """

    points: Tensor
    weights: Tensor
    lows: Tensor
    highs: Tensor
    reach: float | None = None

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each group: (groups,), (groups,)."""
        return self.lows.amin(1), self.highs.amax(1)

    @property
    def count(self) -> float:
        """How many values a group has."""
        return self.points.shape[1] if self.reach is None else self.weights.sum().item()

    def cells(self, reach: Tensor, number: int) -> Tensor:
        """How many values other than 0 each of `number` equal parts of [-reach, 0] and of [0, reach] holds, `reach` (groups,)
        being the largest magnitudes: (groups, 2 * number), float64. Values of a part that lies across cells are spread evenly."""
        if self.reach is None:
            rows = zip(self.points, reach.tolist(), strict=True)
            return torch.stack([counted(row[row != 0], 2 * number, -end, end) for row, end in rows])
        below = F.pad(self.weights[:, :-1].cumsum(1), (1, 0))
        edges = torch.arange(2 * number + 1, dtype=torch.float64, device=below.device) * (BINS / number)
        first = edges.long().clamp(max=2 * BINS - 1)
        return (below[:, first] + (edges - first) * self.weights[:, first]).diff(dim=1)


def values_of(values: Tensor | Values) -> Values:
    """Values (groups, images, n) as `Values`, which are returned as they are."""
    if isinstance(values, Values):
        return values
    flat = values.flatten(1)
    return Values(flat, torch.ones_like(flat), *values.flatten(2).aminmax(dim=2))


class Tally:
    """Gathers the values of tensors on one grid that come in pieces: `see` all, and, where `again` says so, `count` them."""

    def __init__(self, tensors: int) -> None:
        self._lows: list[list[Tensor]] = [[] for _ in range(tensors)]
        self._highs: list[list[Tensor]] = [[] for _ in range(tensors)]
        self._kept: list[Tensor] = []
        self._size = 0
        self._counts: Tensor | float = 0.0  # (2 * BINS,), float64, once there are any
        self._zeros = 0

    def see(self, tensor: int, piece: Tensor) -> None:
        """The next piece (images, ...) of a tensor, by its number."""
        rows = piece.flatten(1) if piece.dim() > 1 else piece.unsqueeze(1)
        low, high = rows.aminmax(dim=1)
        self._lows[tensor].append(low)
        self._highs[tensor].append(high)
        self._size += piece.numel()
        if self._size <= FEW:
            self._kept.append(piece.flatten())
        else:
            self._kept.clear()

    @property
    def again(self) -> bool:
        """Whether there are more values than are kept, so that all pieces are to be counted too, once all were seen."""
        return self._size > FEW

    @property
    def _reach(self) -> float:
        ends = torch.cat([end.abs() for ends in (*self._lows, *self._highs) for end in ends])
        return max(ends.max().item(), SMALLEST_REACH)

    def count(self, piece: Tensor) -> None:
        """Any piece again."""
        if math.isfinite(self._reach):
            self._counts = self._counts + counted(piece.flatten(), 2 * BINS, -self._reach, self._reach)
            self._zeros += piece.numel() - int(piece.count_nonzero())

    def values(self) -> Values:
        """All values: one group, of as many images as the tensors' first axes have in common."""
        lows, highs = ([torch.cat(ends) for ends in found] for found in (self._lows, self._highs))
        rows = math.gcd(*map(len, lows))
        low = torch.cat([ends.view(rows, -1) for ends in lows], 1).amin(1)[None]
        high = torch.cat([ends.view(rows, -1) for ends in highs], 1).amax(1)[None]
        if not self.again:
            points = torch.cat(self._kept)[None]
            return Values(points, torch.ones_like(points), low, high)
        reach = self._reach
        centres = reach * ((torch.arange(2 * BINS, device=low.device) + 0.5) / BINS - 1)
        counts = self._counts - self._zeros * torch.histc(low.new_zeros(1), 2 * BINS, -reach, reach).double()
        weights = torch.cat([counts, counts.new_tensor([float(self._zeros)])])
        return Values(F.pad(centres, (0, 1))[None], weights[None], low, high, reach)


def counted(row: Tensor, bins: int, low: float, high: float) -> Tensor:
    """How many of the values (n,) each of `bins` equal parts of [low, high] holds, exactly: (bins,), float64."""
    return torch.stack([torch.histc(piece, bins, low, high).double() for piece in torch.split(row, EXACT)]).sum(0)


def summarize(values: Tensor | Values) -> tuple[Tensor, Tensor]:
    """Points and their weights (groups, n), for values (groups, ...): the values themselves, or a histogram of many.

    The weights of a histogram are counts in float64.
    """
    if isinstance(values, Values):
        if values.reach is not None:
            points, weights = values.points, values.weights  # two cells to a point, and 0
            points = torch.cat([points[:, :-1].reshape(1, -1, 2).mean(2), points[:, -1:]], 1)
            weights = torch.cat([weights[:, :-1].reshape(1, -1, 2).sum(2), weights[:, -1:]], 1)
            held = weights[0] > 0
            return points[:, held], weights[:, held]
        values = values.points
    flat = values.flatten(1)
    if flat.shape[1] <= BINS:
        return flat, torch.ones_like(flat)
    low, high = flat.aminmax(dim=1)
    counts, centres = [], []
    for row, first, last in zip(flat, low.tolist(), high.tolist(), strict=True):
        last = max(last, first + 1e-30)
        counts.append(counted(row, BINS, first, last))
        centres.append(first + (last - first) / BINS * (torch.arange(BINS, device=row.device) + 0.5))
    return torch.stack(centres), torch.stack(counts)
