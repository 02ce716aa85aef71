"""No choice."""

from __future__ import annotations

from dreamquant.allocation import Allocation, Callback
from dreamquant.network.graph import Network
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.samples import Samples

PAPER = "the baseline"


def uniform(
    network: Network,  # noqa: ARG001
    samples: Samples,  # noqa: ARG001
    plan: Plan,
    *,
    bits: Bits,  # noqa: ARG001
    callback: Callback | None = None,  # noqa: ARG001
) -> Allocation:
    """Leaves every layer as the plan has it."""
    return Allocation(plan)
