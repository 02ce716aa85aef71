"""Images + plan -> grids: a student whose every quantized tensor has its own."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamquant.network.graph import Network
from dreamquant.quantization.activations import activation_grids, grid_finder
from dreamquant.quantization.biases import settle_biases
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.quantization.student import Student, prepare
from dreamquant.quantization.weights import weight_grids


def calibrate(network: Network, images: Tensor, plan: Plan, bits: Bits) -> Student:
    """The student of a network with the ranges that images (N, C, H, W) have, by a plan that leaves nothing to be chosen.

    Raises `OptionError` for options that are not known, `ModelError` where `effect_limit` is set and scores have no gradient.
    """
    student, widths, deciders = prepare(network, plan, bits)
    images = even_batches(network, images)
    find = grid_finder(student, widths, deciders, images)  # while its network is still the float one
    weight_grids(student, widths)
    activation_grids(student, widths, deciders, images, find)
    settle_biases(student, images)
    return student


def even_batches(network: Network, images: Tensor) -> Tensor:
    """Images (N, C, H, W) filled up with themselves to whole batches, where a network runs no other."""
    if not network.batch:
        return images
    return images[torch.arange(-(-len(images) // network.batch) * network.batch, device=images.device) % len(images)]
