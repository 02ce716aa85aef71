"""How long a run will take, told before it starts."""

from __future__ import annotations

import time
from typing import Any

import torch

from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.recipe import Recipe

LEARNING = 4.0  # a step forwards and backwards, with its losses and its update, in times of a forward run
RECONSTRUCTING = 8.0  # the same with quantizers in it, on float and quantized inputs
PROBED_SECONDS = 0.2


def expected_seconds(network: Network, recipe: Recipe) -> float:
    """Processor seconds that a resolved recipe is expected to take: steps times images times what a forward run takes here.

    Good to a factor of about two: methods differ in what they compute beside the network.
    """
    forward = seconds_of_an_image(network)
    synthesis, reconstruction = recipe.synthesis, recipe.reconstruction
    given = _options("synthesis", synthesis.method, synthesis.options)
    images = sum(
        -(-count // given.get("batch", count)) * given.get("batch", count) for count in (synthesis.count, synthesis.held_out)
    )
    dreaming = LEARNING * given.get("steps", 0) * images
    given = _options("reconstruction", reconstruction.method, reconstruction.options)
    learning = RECONSTRUCTING * given.get("steps", 0) * given.get("batch", 0)
    measuring = 6 * (synthesis.images + synthesis.held_out)
    return forward * float(dreaming + learning + measuring)


def seconds_of_an_image(network: Network) -> float:
    """Processor seconds of one image in the float network."""
    images = torch.zeros((network.batch or 8, *network.input_shape))
    network(images)
    began, runs = time.process_time(), 0
    while runs == 0 or time.process_time() - began < PROBED_SECONDS:
        network(images)
        runs += 1
    return (time.process_time() - began) / (runs * len(images))


def _options(family: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A method's options, those not given at their defaults."""
    return {key: parameter.default for key, parameter in find_method(family, name).options.items()} | given
