"""Hybrid quantization: one scale for a whole weight where that does no harm, one for each channel where it does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from dreamquant.allocation import Allocation, Callback
from dreamquant.allocation._sensitivity import (
    damages,
    layer_grids,
    quantized_layers,
    sharing,
    whole_divergence,
    with_layers,
)
from dreamquant.errors import OptionError, unknown
from dreamquant.network.graph import Network
from dreamquant.network.scores import float_answers
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples

PAPER = "GVSL, Kumar et al., Hybrid and Non-Uniform DNN Quantization Methods Using Retro Synthesis Data (2020), arXiv 2012.13716"
MODES = ("accuracy", "latency", "threshold")


def hybrid(
    network: Network,
    samples: Samples,
    plan: Plan,
    *,
    bits: Bits,
    callback: Callback | None = None,
    mode: str = "accuracy",  # or "latency", "threshold"
    threshold: float = 0.0,  # nats, of mode "threshold"
    tolerance: float = 0.05,  # of mode "latency": a fraction of what all-per-channel weights cost
) -> Allocation:
    """Gives a layer's weights one scale each channel only where one scale for all of them costs more.

    Algorithm 2, as it is recalled (the abstract tells of layers chosen by their sensitivity): gap = D_PT - D_PC, the divergences
    (nats) with nothing quantized but the layer's weights, per tensor and per channel. Layers become per channel in the order of
    their gaps, the largest first:

    - `accuracy`: those of gap > 0. The sum of the single divergences is then the least there is, the whole student's need not
      be: while it is worse than that of all-per-channel weights, further layers join (ours; found by bisection).
    - `threshold`: those of gap > `threshold`.
    - `latency`: as few as keep the whole student's divergence within (1 + `tolerance`) of all-per-channel weights' (ours; found
      by bisection, where the paper chooses a threshold by eye).

    Totals are divergences of whole students, and numbers of layers. Layers that share a weight share the choice. Raises
    `OptionError` for a mode or number that is impossible.
    """
    _check(mode, threshold, tolerance)
    names = quantized_layers(network, plan)
    images, expected = samples.images, float_answers(network, samples.images)
    plans = {kind: with_layers(plan, {name: {"granularity": kind} for name in names}) for kind in ("tensor", "channel")}
    students = {kind: quantize(network, samples, bits=str(bits), plan=one) for kind, one in plans.items()}
    grids = {kind: layer_grids(student) for kind, student in students.items()}
    groups = sharing({name: tuple(one.weights) for name, one in grids["channel"].items()})
    every = len(groups)
    changes = [grids[kind][group[0]].weights for kind in plans for group in groups]
    found = damages(network, samples, plan, str(bits), changes, callback)
    tensor, channel = found[:every], found[every:]
    gaps = [one - other for one, other in zip(tensor, channel, strict=True)]
    order = sorted(range(every), key=lambda index: -gaps[index])

    def chosen(length: int) -> dict[str, str]:
        first = {name for index in order[:length] for name in groups[index]}
        return {name: "channel" if name in first else "tensor" for name in names}

    known = {length: whole_divergence(students[kind], expected, images) for length, kind in ((0, "tensor"), (every, "channel"))}

    def whole(length: int) -> float:
        if length not in known:
            changed = with_layers(plan, {name: {"granularity": kind} for name, kind in chosen(length).items()})
            known[length] = whole_divergence(quantize(network, samples, bits=str(bits), plan=changed), expected, images)
        return known[length]

    hurt = sum(gap > (threshold if mode == "threshold" else 0.0) for gap in gaps)
    length = hurt
    if mode == "accuracy":
        length = _shortest(hurt, every, lambda count: whole(count) <= known[every])
    elif mode == "latency":
        near = (1 + tolerance) * known[every]
        length = _shortest(0, hurt if whole(hurt) <= near else every, lambda count: whole(count) <= near)
    choice = chosen(length)
    single = {name: index for index, group in enumerate(groups) for name in group}
    rows = [
        {"layer": name, "tensor": tensor[single[name]], "channel": channel[single[name]], "choice": choice[name]}
        for name in names
    ]
    totals = {
        "all_tensor": known[0],
        "hybrid": whole(length),
        "all_channel": known[every],
        "channel_layers": sum(kind == "channel" for kind in choice.values()),
        "channel_layers_by_gap": sum(kind == "channel" for kind in chosen(hurt).values()),  # before any joined or left
        "layers": len(names),
    }
    return Allocation(with_layers(plan, {name: {"granularity": kind} for name, kind in choice.items()}), rows, totals)


def _shortest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The least length in [low, high] that fits, by bisection; `low` is tried first, `high` is known to fit."""
    return low if fits(low) else low + bisect_left(range(low, high), True, key=fits)


def _check(mode: str, threshold: float, tolerance: float) -> None:
    if mode not in MODES:
        raise OptionError(unknown("hybrid.mode", mode, MODES))
    if not -float("inf") < threshold < float("inf"):
        raise OptionError(f"hybrid.threshold is {threshold}; it must be a finite number of nats")
    if not 0 <= tolerance < float("inf"):
        raise OptionError(f"hybrid.tolerance is {tolerance}; it must be 0 or more, as 0.05 for five percent")
