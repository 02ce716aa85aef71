"""How much accuracy a quantized network is expected to lose, told without a single labelled image, and how far to believe it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dreamquant.assess.probes import Probe


@dataclass(frozen=True)
class Trust:
    """The expected loss of top-1 accuracy, in points, and the interval that holds the true loss in `level` percent of cases.

    It rests on `probes`: the quantized network's answers beside the float one's on images that had no part in quantizing it,
    set against the losses measured with labels in `cases` quantizations of `networks` networks. `warnings` say where this
    network or this result is unlike those.
    """

    drop: float
    low: float
    high: float
    level: float
    cases: int
    networks: int
    probes: list[Probe]
    warnings: list[str] = field(default_factory=list)
