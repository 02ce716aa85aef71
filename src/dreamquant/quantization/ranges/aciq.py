"""Ranges from the error that a distribution predicts."""

import math
from functools import cache

import torch
from torch import Tensor

from dreamquant.errors import OptionError, unknown
from dreamquant.quantization.histogram import Values, values_of

PAPER = "Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment (ACIQ, NeurIPS 2019)"

DISTRIBUTIONS = ("laplace", "gauss", "auto")
# b / sigma at which a Laplace and a normal density are as likely: log(2 b) + 1 = log(sigma sqrt(2 pi)) + 1/2
EVEN = math.sqrt(math.pi / (2 * math.e))


def aciq(values: Tensor | Values, *, bits: int, symmetric: bool, distribution: str = "laplace") -> tuple[Tensor, Tensor]:
    """The range whose clipping and rounding errors together are least for values of a known distribution.

    `laplace`: centre -+ k(bits) b, b the mean distance from the centre; `gauss`: sigma, the root of the mean squared distance, in
    its place; `auto`: for each group the one of higher likelihood. k is `clip`; a range never exceeds the values.

    The centre is the mean; for a symmetric grid, whose middle is 0, it is 0. A group of one sign is taken for the output of a
    ReLU: its range begins at its values' end near 0 and uses half the error's formula, k(bits + 1), or k(bits) on a symmetric
    grid, half of which it leaves empty. The paper takes mean and b before the ReLU; from the values after it the median (that of
    the values before, or 0) and the mean distance of the values above it are the same two numbers, undisturbed by the zeros.

    Raises `OptionError` for an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise OptionError(unknown("aciq.distribution", distribution, DISTRIBUTIONS))
    values = values_of(values)
    flat, weights = values.points, values.weights.to(values.points.dtype)
    sign = torch.where(values.ends[1] <= 0, -1.0, 1.0)  # what has no positive value is turned round, and back in the end
    flat = flat * sign[:, None]
    low, high = (torch.where(sign > 0, *pair) for pair in zip(values.ends, (-end for end in reversed(values.ends)), strict=True))
    half = low >= 0
    middle = torch.zeros_like(low) if symmetric else (flat * weights).sum(1) / weights.sum(1)
    centre = torch.where(half, _medians(flat, weights), middle).clamp(low, high)
    distance = flat - centre[:, None]
    distance = torch.where(half[:, None], distance.clamp(min=0), distance.abs())
    count = torch.where(half, ((distance > 0) * weights).sum(1).clamp(min=1), weights.sum(1))
    b, sigma = (distance * weights).sum(1) / count, ((distance.square() * weights).sum(1) / count).sqrt()
    half_bits = bits if symmetric else bits + 1
    laplace = torch.where(half, clip(half_bits, "laplace"), clip(bits, "laplace")) * b
    gauss = torch.where(half, clip(half_bits, "gauss"), clip(bits, "gauss")) * sigma
    alpha = {"laplace": laplace, "gauss": gauss, "auto": torch.where(b < EVEN * sigma, laplace, gauss)}[distribution]
    low = torch.where(half, low, torch.maximum(low, centre - alpha))
    high = torch.minimum(high, centre + alpha)
    return torch.where(sign > 0, low, -high), torch.where(sign > 0, high, -low)


def _medians(flat: Tensor, weights: Tensor) -> Tensor:
    """The median of each group's values, of two in the middle the lower one."""
    points, order = flat.sort(dim=1)
    below = weights.double().gather(1, order).cumsum(1)
    return points.gather(1, torch.searchsorted(below, below[:, -1:] / 2)).squeeze(1)


@cache
def clip(bits: int, distribution: str) -> float:
    """k: the best clip of 2^bits levels, in units of b or sigma.

    The minimum over k of the clipping error plus the rounding error k^2 / (3 4^bits): 2 exp(-k) + ... for `laplace`,
    (1 + k^2) erfc(k / sqrt 2) - sqrt(2 / pi) k exp(-k^2 / 2) + ... for `gauss` (section 3 of the paper). On [0, k] the levels
    stand twice as dense, which is one bit more.
    """
    rounding = 0.25**bits / 3

    def slope(k: float) -> float:  # half the derivative; it grows with k
        if distribution == "laplace":
            return rounding * k - math.exp(-k)
        return rounding * k + k * math.erfc(k / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-k * k / 2)

    below, above = 0.0, 40.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if slope(middle) < 0 else (below, middle)
    return below
