"""Allocation: which layer gets how many bits, and of what granularity. One file a method.

The contract: `name(network, samples, plan, *, bits, callback, ...) -> Allocation`: the plan with `layers` of its own, and a row
of what was measured for each layer. Divergences are mean Kullback-Leibler divergences of the quantized network's softmax from
the float one's on the samples, in nats; of outputs that are no classes, the distance of their kind (`network.answers`); of
several outputs, the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dreamquant.allocation._sensitivity import Callback, LayerDamage, sensitivities
from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.quantization.plan import Plan, load_plan, parse_bits
from dreamquant.samples import Samples

__all__ = ["Allocation", "Callback", "LayerDamage", "allocate", "sensitivities"]


@dataclass(frozen=True)
class Allocation:
    """A plan whose `layers` were chosen, what was measured for each (`name` and numbers), and what holds for all of them."""

    plan: Plan
    layers: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)


def allocate(
    network: Network,
    samples: Samples,
    plan: str | Plan = "deploy",
    *,
    bits: str = "W8A8",
    method: str = "uniform",
    callback: Callback | None = None,
    **options: Any,
) -> Allocation:
    """The plan with bits and granularity chosen layer by layer, by a method's name; `options` are the method's own.

    Raises `OptionError` for names, bits and options that are not known, and for what a method cannot reach, `DataError` for
    samples that do not fit the network.
    """
    found = find_method("allocation", method)
    samples.check(network.input_shape)
    chosen = load_plan(plan) if isinstance(plan, str) else plan
    allocation: Allocation = found.function(
        network, samples, chosen, bits=parse_bits(bits), callback=callback, **found.check_options(options)
    )
    return allocation
