"""Even levels in three clusters."""

import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import grid_of_range

PAPER = "GVSL, Kumar et al., Hybrid and Non-Uniform DNN Quantization Methods Using Retro Synthesis Data (2020), arXiv 2012.13716"

SHARES = (0.5, 0.25, 0.75, 0.0, 1.0)  # of those as good, the first
TINY = 1e-300


def quartiles(rows: Tensor, *, bits: int, share: float = 0.5, fence: float = 1.5, search: bool = True) -> Tensor:
    """Spaces levels evenly in each of three clusters, low tail, body, high tail, that share them by their count and their range.

    The body is [Q1 - `fence` * (Q3 - Q1), Q3 + `fence` * (Q3 - Q1)] of the quartiles Q1 and Q3. Cluster j of n_j weights over
    the range r_j has 2^bits (a n_j / sum n + (1 - a) r_j / sum r) levels, `share` being a, from its smallest to its largest
    weight; largest remainders make them whole. It has two at least, one where its weights are all the same; with 2 bits one
    in the middle of a tail. Of the body's levels the nearest to 0 is moved to 0.

    The abstract tells of clusters that share levels by count and range; that there are three, cut by quartiles, is recalled of
    the paper; fences, formula, and what follows are ours. `search`: each group
    has the share of 0, 1/4, 1/2, 3/4, 1 with the least squared error instead, and the levels of the symmetric or asymmetric
    uniform grid over its whole range where those are better still, so that no group is worse off than on them.

    Raises `OptionError` for a share outside 0 to 1 and for a negative fence.
    """
    if not 0.0 <= share <= 1.0:
        raise OptionError(f"quartiles.share is {share}; it must be from 0 to 1")
    if not fence >= 0.0:
        raise OptionError(f"quartiles.fence is {fence}; it must not be negative")
    number, low, high = _clusters(rows, fence)
    if not search:
        return _levels(number, low, high, share=share, count=2**bits)
    candidates = [_levels(number, low, high, share=a, count=2**bits) for a in SHARES]
    candidates += [_uniform(rows, bits=bits, symmetric=symmetric) for symmetric in (True, False)]
    errors = torch.stack([(Codebook(levels, 0).fake(rows) - rows).square().sum(1) for levels in candidates])
    return torch.stack(candidates)[errors.argmin(0), torch.arange(len(rows), device=rows.device)]


def _uniform(rows: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """The levels of the min-max grid of each row."""
    grid = grid_of_range(*rows.aminmax(dim=1), bits=bits, symmetric=symmetric, axis=0)
    scale, zero_point = grid.shaped(2)
    return (torch.arange(grid.qmin, grid.qmax + 1, device=scale.device) - zero_point) * scale


def _clusters(rows: Tensor, fence: float) -> tuple[Tensor, Tensor, Tensor]:
    """How many weights low tail, body and high tail have, their smallest and their largest; (groups, 3) each.

    The quartiles are weights of the row, so that no body is empty. An empty tail has the range [0, 0].
    """
    ordered, last = rows.double().sort(1).values, rows.shape[1] - 1
    first, third = ordered[:, last // 4].unsqueeze(1), ordered[:, last - last // 4].unsqueeze(1)
    reach = fence * (third - first)
    start = torch.searchsorted(ordered, first - reach)
    stop = torch.searchsorted(ordered, third + reach, right=True)
    edges = torch.cat([torch.zeros_like(start), start, stop, torch.full_like(start, last + 1)], 1)
    number = edges.diff(dim=1)
    low, high = ordered.gather(1, edges[:, :-1].clamp(max=last)), ordered.gather(1, (edges[:, 1:] - 1).clamp(min=0))
    return number, low.where(number > 0, 0.0), high.where(number > 0, 0.0)


def _steps(number: Tensor, low: Tensor, high: Tensor, *, share: float, count: int) -> Tensor:
    """The number of levels of each cluster, (groups, 3); `count` in each row."""
    width = high - low
    wide = width > 0
    least = (number > 0).long() + wide
    least[:, 1] += ~wide[:, 1] & (low[:, 1] != 0)  # one of them goes to 0
    least = least.where(least.sum(1, keepdim=True) <= count, least.clamp(max=least.new_tensor([1, 2, 1])))
    wide[:, 1] |= ~wide.any(1)  # where each cluster is one value, the body repeats its own
    part = share * number / number.sum(1, keepdim=True) + (1 - share) * width / width.sum(1, keepdim=True).clamp(min=TINY)
    part = part.clamp(min=TINY) * wide
    quota = (count - (least * ~wide).sum(1, keepdim=True)) * part / part.sum(1, keepdim=True)
    steps = least
    while bool((missing := steps.sum(1, keepdim=True) < count).any()):  # to the one that lacks most: the largest remainder
        neediest = (quota - steps).where(wide, -torch.inf).argmax(1, keepdim=True)
        steps = steps.scatter_add(1, neediest, missing.long())
    return steps


def _levels(number: Tensor, low: Tensor, high: Tensor, *, share: float, count: int) -> Tensor:
    """The levels (groups, count) of clusters (groups, 3)."""
    steps = _steps(number, low, high, share=share, count=count)
    ends, index = steps.cumsum(1), torch.arange(count, device=steps.device)
    cluster = (index >= ends[:, :1]).long() + (index >= ends[:, 1:2])
    place, intervals = index - (ends - steps).gather(1, cluster), steps.gather(1, cluster) - 1
    fraction = torch.where(intervals > 0, place / intervals.clamp(min=1), 0.5)
    levels = low.gather(1, cluster) + (high - low).gather(1, cluster) * fraction
    nearest = levels.abs().where(cluster == 1, torch.inf).argmin(1, keepdim=True)
    return levels.scatter(1, nearest, 0.0).sort(1).values.float()
