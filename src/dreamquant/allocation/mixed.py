"""Mixed precision: bits go where they matter most, within a budget."""

from __future__ import annotations

import math

from dreamquant.allocation import Allocation, Callback
from dreamquant.allocation._sensitivity import whole_divergence, with_layers
from dreamquant.allocation._solver import damage
from dreamquant.allocation._table import frontier, measure
from dreamquant.errors import OptionError, unknown
from dreamquant.network.graph import Network
from dreamquant.network.scores import float_answers
from dreamquant.quantization.plan import LARGEST_BITS, SMALLEST_BITS, Bits, Plan
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples

PAPER = "Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework (CVPR 2020), arXiv 2001.00281"
BUDGETS_OF = ("operations", "size")
AVERAGES = [half / 2 for half in range(2 * SMALLEST_BITS, 2 * LARGEST_BITS + 1)]  # of the frontier


def mixed(
    network: Network,
    samples: Samples,
    plan: Plan,
    *,
    bits: Bits,
    callback: Callback | None = None,
    average: float = 4.0,
    budget: str = "size",  # or "operations"
    choices: str = "2,3,4,6,8",
    activations: bool = False,  # inputs have bits of their own too; of budget "operations"
) -> Allocation:
    """Gives each layer the bits that together do the least damage, at a given average of bits.

    The paper's measure and budget: minimise the sum over layers of Omega_i(k_i), the divergence (nats) that layer i's weights of
    k_i bits do alone, k_i being one of `choices`, subject to

    - `size`: sum of parameters x k_i <= `average` x sum of parameters;
    - `operations`: sum of multiplications x k_i x input bits <= `average` x sum of multiplications x input bits of the plan.

    With `activations` the input bits are chosen as well, at the divergence that the input does alone. The sum is the least there
    is (the search, ours, is exact); the whole student's divergence is another thing, and is measured. First and last layer are as
    any other; layers that share a weight share its bits.

    Rows: parameters or multiplications of one image (`count`), divergences at each width, and the bits chosen. Totals: the
    average reached, the sum of divergences (`damage`), the whole student's divergence and that of one with the same bits
    everywhere, the most that the average allows, and the frontier of the sums at averages 2, 2.5, ... 8. Raises `OptionError`
    for options that are impossible, as an average below the fewest bits.
    """
    widths = _widths(choices)
    _check(average, budget, widths, activations)
    table = measure(network, samples, plan, bits, widths, budget=budget, activations=activations, callback=callback)
    best = table.solve(average)
    if best is None:
        raise OptionError(
            f"mixed.average is {average:g}; even the fewest bits of mixed.choices everywhere ({widths[0]}) cost more"
        )
    changed = with_layers(plan, table.fields(best))
    expected = float_answers(network, samples.images)

    def whole(one: Plan) -> float:
        return whole_divergence(quantize(network, samples, bits=str(bits), plan=one), expected, samples.images)

    same = max((width for width in widths if width <= average), default=widths[0])
    totals = {
        "budget": budget,
        "average": table.average(best),
        "damage": damage(best),
        "divergence": whole(changed),
        "uniform_bits": same,
        "uniform_divergence": whole(with_layers(plan, {layer: {"weight_bits": same} for layer in table.counts})),
        "frontier": frontier(table, [one for one in AVERAGES if widths[0] <= one <= widths[-1]]),
    }
    return Allocation(changed, table.rows(best), totals)


def _widths(choices: str) -> list[int]:
    try:
        widths = sorted({int(part) for part in choices.split(",")})
    except ValueError:
        widths = []
    if not widths or widths[0] < SMALLEST_BITS or widths[-1] > LARGEST_BITS:
        raise OptionError(
            f"mixed.choices is {choices!r}; write numbers of bits from {SMALLEST_BITS} to {LARGEST_BITS} with commas, as 2,4,8"
        )
    return widths


def _check(average: float, budget: str, widths: list[int], activations: bool) -> None:
    if budget not in BUDGETS_OF:
        raise OptionError(unknown("mixed.budget", budget, BUDGETS_OF))
    if activations and budget != "operations":
        raise OptionError("mixed.activations needs mixed.budget operations: the bits of inputs change no file's size")
    if not average < math.inf or (not activations and average < widths[0]):
        raise OptionError(
            f"mixed.average is {average:g}; no average below {widths[0]} bits, the fewest of mixed.choices, can be met"
        )
