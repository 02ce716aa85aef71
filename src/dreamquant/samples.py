"""`Samples`: images that a network was calibrated, or is to be compared, on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W), float32, in the network's input space; `labels` (N,) where they were made for classes.

    `confidence` (N,) is the probability that the network gives to its own first choice; None where nobody asked it. `losses`
    is the objective's value at each step (empty if nothing was optimised); `method`, `seed` and `options` say how to make them
    again.
    """

    images: Tensor
    labels: Tensor | None = None
    method: str = ""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    confidence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)
