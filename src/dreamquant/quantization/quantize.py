"""Network + samples + plan -> student: every quantized tensor gets its grid."""

from __future__ import annotations

from typing import Any

import torch

from dreamquant.network.graph import Network
from dreamquant.network.live import check_run
from dreamquant.plain import plain_torch
from dreamquant.quantization.activations import activation_grids, grid_finder
from dreamquant.quantization.biases import settle_biases
from dreamquant.quantization.plan import Plan, change_plan, load_plan, parse_bits
from dreamquant.quantization.student import Student, prepare
from dreamquant.quantization.weights import weight_grids
from dreamquant.samples import Samples


@plain_torch()
def quantize(network: Network, samples: Samples, *, bits: str = "W8A8", plan: str | Plan = "deploy", **changes: Any) -> Student:
    """The student of a network: `plan` says which tensors are quantized and how, `samples` set the ranges.

    `changes` replace fields of the plan, e.g. `weight_ranges="mse"`. Raises `OptionError` for names, bits and options that are
    not known, `DataError` for samples that do not fit the network, `ModelError` where `effect_limit` is set and scores have no
    gradient.
    """
    plan = load_plan(plan, **changes) if isinstance(plan, str) else change_plan(plan, **changes)
    width = parse_bits(bits)
    samples.check(network.input_shape)
    check_run(network, len(samples))
    student, widths, deciders = prepare(network, plan, width)
    batch, images = network.batch, samples.images
    if batch:  # only whole batches can be run; each image is to count as often as another
        images = images[torch.arange(-(-len(images) // batch) * batch) % len(images)]
    find = grid_finder(student, widths, deciders, images)  # while its network is still the float one
    weight_grids(student, widths)
    activation_grids(student, widths, deciders, images, find)
    settle_biases(student, images)
    return student
