"""Tensors that are left in float because the file is faster so: found by timing, where it is no faster than the float file.

Whether an integer kernel is faster than a float one depends on the layer and on the processor. Layers that take longer than in
the float file are tried in float, all of them first, then those that lose most. Timing needs no accuracy: files to be timed are
made on one image. This is the only place where a file depends on how fast a machine is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dreamquant.assess.assess import WORTH, float_file, timed
from dreamquant.assess.latency import Latency
from dreamquant.assess.layer_times import layer_times, layers_of
from dreamquant.exporters.qdq import to_onnx
from dreamquant.network.graph import Network
from dreamquant.quantization.calibrate import calibrate
from dreamquant.quantization.plan import Bits, Plan, change_plan, keep_in_float
from dreamquant.quantization.sites import activation_sites
from dreamquant.quantization.student import Student, transformed
from dreamquant.samples import Samples

Callback = Callable[[int, int], None]  # (steps done, steps in all)
STEPS = 4  # how many sets of layers are tried, each half of the one before


@dataclass(frozen=True)
class Fastest:
    """What was tried for speed: how many times as fast as float the file was `before` and is `after`, and what was left in float
    for that, `float_tensors`, of `tried` sets of tensors."""

    before: float
    after: float
    float_tensors: tuple[str, ...] = ()
    tried: int = 0

    def __str__(self) -> str:
        if self.float_tensors:
            names = ", ".join(self.float_tensors)
            return f"{self.before:.2f} times as fast as float with all in integers, {self.after:.2f} with {names} in float"
        if self.tried:
            return f"{self.before:.2f} times as fast as float; nothing left in float makes it faster"
        return f"{self.before:.2f} times as fast as float; nothing was tried"


def hastened(
    network: Network, samples: Samples, plan: Plan, bits: Bits, callback: Callback | None = None
) -> tuple[Plan, Fastest]:
    """The plan with the tensors in float that make its file fastest, of those that are tried; as it is where it is fast enough,
    `assess.WORTH` times as fast as float, or nothing helps beyond chance.

    Raises what `calibrate`, `to_onnx` and the runtime do.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reference = float_file(network, folder)

        path = folder / "tried.onnx"

        def time(tried: Plan) -> tuple[Student, Mapping[str, str], Latency]:
            student = calibrate(network, samples.images[:1], change_plan(tried, bias_correction="none"), bits)
            file = to_onnx(student)
            path.write_bytes(file.proto.SerializeToString())
            return student, file.names, timed(network, reference, path)

        student, values, first = time(plan)
        best = Fastest(first.ratio, first.ratio)
        if first.ratio >= WORTH:
            return plan, best
        slow = [one.layer for one in layer_times(network, student, reference, path, values) if one.ms > one.float_ms]
        counts = sorted({-(-len(slow) // 2**step) for step in range(STEPS)} - {0}, reverse=True)
        seen: list[tuple[str, ...]] = []
        chosen = plan
        for number, count in enumerate(counts):
            names = _within(network, plan, bits, slow[:count])
            if names and names not in seen:
                seen.append(names)
                tried = keep_in_float(plan, names)
                latency = time(tried)[2]
                if latency.ratio_low > max(best.after, first.ratio_high):
                    chosen, best = tried, Fastest(first.ratio, latency.ratio, names)
            if callback is not None:
                callback(number + 1, len(counts))
        return chosen, Fastest(best.before, best.after, best.float_tensors, len(seen))


def _within(network: Network, plan: Plan, bits: Bits, layers: Collection[str]) -> tuple[str, ...]:
    """The grids of tensors that these layers give, and that nothing but they read."""
    graph = transformed(network, plan, bits).graph.graph
    layer = layers_of(graph)
    inside: dict[str, bool] = {}
    for site in activation_sites(graph, plan, bits):
        near = {layer[node.name] for node in (site.node, *site.users) if node.name in layer}
        inside[site.name] = inside.get(site.name, True) and near.issubset(layers)
    return tuple(name for name, is_inside in inside.items() if is_inside and name not in plan.float_tensors)
