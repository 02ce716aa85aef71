"""`Codebook`: levels at any distance from one another, for weights that crowd around zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """The levels of a stored tensor: `levels` (1, L) for all of it, or (channels, L), a row for each channel of `axis`.

    Float32, ascending along a row, 0 among them; L is a power of two. A row that needs fewer levels repeats some.
    """

    levels: Tensor
    axis: int | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Codebook:
        """The codebook whose levels are `function` of these."""
        return replace(self, levels=function(self.levels))

    @property
    def bits(self) -> int:
        """The number of bits that an index takes."""
        return (self.levels.shape[1] - 1).bit_length()

    def rows(self, x: Tensor) -> Tensor:
        """x as (rows of `levels`, n), a row for each channel."""
        return x.reshape(1, -1) if self.axis is None else x.transpose(0, self.axis).flatten(1)

    def indices(self, x: Tensor) -> Tensor:
        """The indices (int64, of x's shape) of the levels nearest to x; of two that are as near, the lower."""
        levels = self.levels.to(x.dtype)
        rows = self.rows(x).contiguous()
        found = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, rows)
        return self._back(found, x)

    def fake(self, x: Tensor) -> Tensor:
        """x moved to its nearest level; gradients pass straight through."""
        levels = self.levels.to(x.dtype)
        nearest = self._back(levels.gather(1, self.rows(self.indices(x))), x)
        return x + (nearest - x).detach() if torch.is_grad_enabled() and x.requires_grad else nearest

    def _back(self, rows: Tensor, x: Tensor) -> Tensor:
        """What `rows` did, undone."""
        if self.axis is None:
            return rows.reshape(x.shape)
        return rows.reshape(x.transpose(0, self.axis).shape).transpose(0, self.axis).contiguous()
