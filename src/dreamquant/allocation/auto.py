"""More bits for the layers that need them, until the network says again what it said."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dreamquant.allocation import Allocation, Callback, sensitivities
from dreamquant.allocation._sensitivity import with_layers
from dreamquant.errors import OptionError
from dreamquant.methods import SEEDS
from dreamquant.network.answers import agreement as agree
from dreamquant.network.answers import counts_images, distances, possible
from dreamquant.network.graph import Network
from dreamquant.network.scores import float_answers
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples, halves
from dreamquant.synthesis import synthesize

PAPER = "this project, on the measure of ZeroQ (CVPR 2020)"
SHOWN = 8  # layers in a message
DIFFER = 2  # images that may differ where the agreement asked for is just reached: fewer cannot tell it
MOST = 400  # images to measure on
SURER = 4  # times as many procedural images are made, and those kept that the network is surest of
PIECE = 16  # images kept at a time
SEED = 3  # more than that of the calibration; the two between are a run's held-out images and probes
EIGHT = {"weight_bits": 8, "input_bits": 8}
FLOAT = EIGHT | {"keep_float": True}  # an input that sums read too is quantized all the same


def auto(
    network: Network,
    samples: Samples,
    plan: Plan,
    *,
    bits: Bits,
    callback: Callback | None = None,
    agreement: float = 99.0,  # percent of samples whose top class is the float network's; other outputs in their own unit
    kl: float = math.inf,  # nats; the whole student's divergence is to be at most this
    most: int = 0,  # layers that may be raised; 0: all
) -> Allocation:
    """Raises the worst layers to 8 bits, then leaves the worst of them float, until the student agrees with the network.

    Layers are raised in the order of the divergence that their weights and their input do alone, the worst first; how many is
    found by bisection, at 8 bits first, then, all that may be raised having 8 bits, in float by the order of what is left of
    their damage. Of several outputs the one that agrees least counts, and their divergences are summed. Every other sample is
    calibrated on and the rest is what agreement is measured on, a single one both. Where it is a share of images and these are
    too few to tell it, procedural ones that the network is sure of are measured on too: so many that two may differ where the
    agreement asked for is just reached, and 400 at most.

    Rows: the damage (nats) at the plan's bits, and the decision. Totals: agreement (percent) and divergence (nats) before and
    after, the images that they were measured on and how many of these are procedural, and of shares of images what so many
    leave possible (Wilson's interval, 95 percent). Raises `OptionError` for impossible options, and where what is asked cannot
    be reached, or by the float network alone.
    """
    if not 0 <= agreement <= 100 or not kl >= 0 or most < 0:
        raise OptionError(f"auto asks for agreement {agreement} (0 to 100), kl {kl} (0 or more), most {most} (0 or more)")
    seen, rest = halves(samples)
    held_out = _enough(network, rest, agreement)
    damage = _damage(network, seen, plan, bits, callback)
    ranking = sorted(damage, key=lambda name: -damage[name])[: most or None]
    every, worst = len(ranking), ranking
    expected = float_answers(network, held_out.images)
    measured: dict[tuple[int, int], tuple[float, float]] = {}

    def agreed(actual: list[Tensor]) -> float:
        found = zip(network.outputs, expected, actual, strict=True)
        return min(agree(output, one, other) for output, one, other in found if output.axis is not None)

    def raised(eight: int, kept: int) -> Plan:
        return with_layers(plan, {**dict.fromkeys(ranking[:eight], EIGHT), **dict.fromkeys(worst[:kept], FLOAT)})

    def fits(eight: int, kept: int) -> bool:
        if (eight, kept) not in measured:
            student = quantize(network, seen, bits=str(bits), plan=raised(eight, kept))
            actual = float_answers(student.network, held_out.images)
            measured[eight, kept] = agreed(actual), distances(network.outputs, expected, actual)
        reached = measured[eight, kept]
        return reached[0] >= agreement and reached[1] <= kl

    if fits(0, 0):
        found = (0, 0)
    elif fits(every, 0):
        found = (bisect_left(range(every), True, key=lambda count: fits(count, 0)), 0)
    else:
        left = _damage(network, seen, raised(every, 0), bits, callback)
        worst = sorted(ranking, key=lambda name: -left[name])
        if not fits(every, every):
            raise OptionError(_unreached(agreement, kl, measured[0, 0], measured[every, every], worst))
        found = (every, bisect_left(range(every), True, key=lambda count: fits(every, count)))
        if found[1] == len(damage):
            fewer = measured[every, every - 1]
            raise OptionError(
                f"auto reaches agreement {agreement:g} with kl {kl:g} only with every layer left float, which is no quantization;"
                f" with one layer less in float it comes to agreement {fewer[0]:.2f} with kl {fewer[1]:.3g}, on"
                f" {len(held_out)} images"
            )
    eights, floats = ranking[: found[0]], worst[: found[1]]
    decisions = {**dict.fromkeys(damage, "as the plan"), **dict.fromkeys(eights, "8 bits"), **dict.fromkeys(floats, "float")}
    rows = [{"layer": name, "damage": damage[name], "decision": decisions[name]} for name in damage]
    before, after = measured[0, 0], measured[found]
    totals = {
        "agreement_before": before[0],
        "agreement_after": after[0],
        "divergence_before": before[1],
        "divergence_after": after[1],
        "raised": max(found),
        "layers": len(damage),
        "held_out": len(held_out),
        "procedural": len(held_out) - len(rest),
    }
    if all(counts_images(output) for output in network.outputs if output.axis is not None):
        low, high = possible(after[0] / 100, len(held_out))
        totals |= {"agreement_low": 100 * low, "agreement_high": 100 * high}
    return Allocation(raised(*found), rows, totals)


def _enough(network: Network, samples: Samples, agreement: float) -> Samples:
    """The samples, and procedural images beside them where so few cannot tell the agreement that is asked for.

    Of four times as many they are those that the network is surest of, as it is of images like those it was trained on: where it
    wavers, its answer changes with the least error, and says nothing of one (docs/methods.md has numbers).
    """
    told = DIFFER * 100 / (100 - agreement) if agreement < 100 else MOST
    lacking = min(math.ceil(told), MOST) - len(samples)
    if lacking <= 0 or not network.space.is_known or not any(map(counts_images, network.outputs)):
        return samples
    more = []
    for piece, start in enumerate(range(0, lacking, PIECE)):
        made = synthesize(network, SURER * PIECE, method="fractal", seed=(samples.seed + SEED + piece) % SEEDS)
        assert made.confidence is not None  # there is an output of classes
        more.append(made.images[made.confidence.topk(min(PIECE, lacking - start)).indices])
    return replace(samples, images=torch.cat([samples.images, *more]))


def _damage(network: Network, samples: Samples, plan: Plan, bits: Bits, callback: Callback | None) -> dict[str, float]:
    return {one.layer: one.both for one in sensitivities(network, samples, plan, str(bits), callback)}


def _unreached(
    agreement: float, kl: float, before: tuple[float, float], after: tuple[float, float], layers: Sequence[str]
) -> str:
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return (
        f"auto cannot reach agreement {agreement:g} with kl {kl:g}: with {', '.join(layers[:SHOWN])}{more} left float it comes "
        f"to agreement {after[0]:.2f} with kl {after[1]:.3g}, from {before[0]:.2f} with kl {before[1]:.3g}"
    )
