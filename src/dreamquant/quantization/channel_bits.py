"""How many bits each channel of a weight gets."""

from collections.abc import Callable

import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.quantization.grid import Grid, grid_of_range

MOST = 8


def channel_bits(rows: Tensor, bits: int) -> Tensor:
    """The bits of each channel (channels,), whole numbers of 0 to 8 as int64, for rows (channels, n) and a mean of `bits`.

    ACIQ's allocation (Banner et al., NeurIPS 2019, section 4): the rounding error of channel i is alpha_i^2 / (3 B_i^2) for B_i
    levels on [-alpha_i, alpha_i], and the sum over channels is least, for B = channels * 2^bits levels in all, at

        B_i = alpha_i^(2/3) / sum_j alpha_j^(2/3) * B

    so that bits_i = log2 B_i = 2/3 log2 alpha_i + c. Here c is what brings the whole numbers' sum to channels * bits: floors of
    log2 B_i first, the bits that remain to the largest remainders; what 0 and 8 cut off is shared by the others alike. At a given
    number of bits the clip is a fixed multiple of the spread, and alpha_i is taken to be the root of the mean square; about 0, as
    every grid holds 0, and a channel of 0 bits is 0. The sum falls short only where all channels that are not 0 have 8 bits.

    Raises `OptionError` where `bits` is not within 0 and 8.
    """
    if not 0 <= bits <= MOST:
        raise OptionError(f"{bits} bits a channel; there can be 0 to {MOST}")
    alpha = rows.double().square().mean(1).sqrt()
    # a channel's next bit is worth its log2 B_i less the bits that it has; the most valuable ones are bought
    worth = (2 / 3 * alpha.log2())[:, None] - torch.arange(MOST, device=rows.device)
    bought = worth.flatten().sort(descending=True, stable=True).indices[: len(rows) * bits]
    given = bought.new_zeros(worth.numel()).index_fill(0, bought, 1).view_as(worth)
    return torch.where(alpha > 0, given.sum(1), 0)


def grid_of_channels(rows: Tensor, widths: Tensor, find: Callable[..., tuple[Tensor, Tensor]], axis: int) -> tuple[Grid, Tensor]:
    """A grid with as many levels a channel as `widths` (channels,) bits allow, and the rows (channels, n) moved to them.

    The integers of all channels go into the widest one's, unsigned. `find` is a range method, asked with each width. A channel
    of 0 bits is 0 throughout.
    """
    scale, zero_point, values = rows.new_ones(len(rows)), rows.new_zeros(len(rows)), torch.zeros_like(rows)
    for width in sorted(set(widths.tolist())):
        if width:
            chosen = widths == width
            low, high = find(rows[chosen].unsqueeze(1), bits=width, symmetric=False)
            part = grid_of_range(low, high, bits=width, symmetric=False, axis=0)
            scale[chosen], zero_point[chosen], values[chosen] = part.scale, part.zero_point, part.fake(rows[chosen])
    return Grid(scale, zero_point, 0, (1 << max(int(widths.max()), 1)) - 1, axis), values
