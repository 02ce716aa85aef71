"""Network + samples + plan -> student: every quantized tensor gets its grid."""

from __future__ import annotations

from typing import Any

from dreamquant.network.graph import Network
from dreamquant.network.live import check_run
from dreamquant.plain import plain_torch
from dreamquant.quantization.calibrate import calibrate
from dreamquant.quantization.choice import choose
from dreamquant.quantization.plan import Plan, change_plan, check_bits, load_plan, parse_bits
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples


@plain_torch()
def quantize(network: Network, samples: Samples, *, bits: str = "W8A8", plan: str | Plan = "deploy", **changes: Any) -> Student:
    """The student of a network: `plan` says which tensors are quantized and how, `samples` set the ranges.

    `changes` replace fields of the plan, e.g. `weight_ranges="mse"`. Raises `OptionError` for names, bits and options that are
    not known, `DataError` for samples that do not fit the network, `ModelError` where `effect_limit` is set and scores have no
    gradient, and where ranges are to be chosen and no answer is a finite number.
    """
    plan = load_plan(plan, **changes) if isinstance(plan, str) else change_plan(plan, **changes)
    width = parse_bits(bits)
    check_bits(plan, width)
    samples.check(network.input_shape)
    check_run(network, len(samples) if plan.observe == "quantized" else network.batch or 1)
    return calibrate(network, samples.images, choose(network, samples, plan, width).plan, width)
