"""How long a run will take, told before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dreamquant.devices import CPU
from dreamquant.methods import find_method
from dreamquant.network.graph import Network
from dreamquant.network.live import at_once
from dreamquant.quantization.plan import CHOSEN
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.recipe import Recipe
from dreamquant.synthesis import synthesize

# what is done with one image, in times of a forward run of the float network; measured on the networks of docs/benchmarks.md
LEARNING = 4.0  # a step of a dream: forwards and backwards, with its losses and its update
QUANTIZING = 10.0  # ranges of all tensors, and biases
CHOOSING = 15.0  # of ranges and bias correction, by what they do to the outputs
WEIGHING = 3.0  # one layer, by its weights and by its input
RECONSTRUCTING = 6.0  # a step of all units together, on float and quantized inputs
TRAINING = 6.0  # a step of the student, its teacher and the generator
ANSWERING = 3.0  # the float network, the student and the file
PROBED_SECONDS = 0.2
PROBED_IMAGES = 4
TIMED = 8  # images that the float network is timed on together

Stage = tuple[str, int, dict[str, Any]]  # of synthesis: method, number of images, options


def expected_seconds(network: Network, recipe: Recipe, probes: Iterable[Stage] = ()) -> float:
    """Processor seconds, on a GPU seconds, that a resolved recipe is expected to take: steps times images times what a
    forward run takes here.

    `probes` are the images that the loss of accuracy is told from, which take their time too. Good to a factor of two to
    three: methods differ in what they compute beside the network, and large networks dream and learn in bfloat16 where they can.
    """
    forward = seconds_of_an_image(network)
    synthesis = recipe.synthesis
    answered = [(synthesis.method, synthesis.held_out, synthesis.options), *probes]
    calibration = (synthesis.method, synthesis.count, synthesis.options)
    dreaming = sum(_dreaming_seconds(network, forward, *stage) for stage in (calibration, *answered))
    plan = recipe.quantization.resolved()
    chosen = CHOSEN in (plan.activation_ranges, plan.bias_correction, plan.spare)
    runs = (QUANTIZING + CHOOSING * chosen) * synthesis.images
    if recipe.allocation.method != "uniform":
        runs += WEIGHING * synthesis.images * len(weighted_nodes(network.graph.graph))
    given = _options("reconstruction", recipe.reconstruction.method, recipe.reconstruction.options)
    runs += RECONSTRUCTING * given.get("steps", 0) * given.get("batch", 0)
    if recipe.training is not None:
        given = _options("training", recipe.training.method, recipe.training.options)
        runs += TRAINING * given["epochs"] * given["iterations"] * given["batch"]
    runs += ANSWERING * sum(count for _, count, _ in answered)
    return float(dreaming + forward * runs)


def _dreaming_seconds(network: Network, forward: float, method: str, count: int, options: dict[str, Any]) -> float:
    """What `count` images take: by the steps of a method that has steps, else timed on a few."""
    given = _options("synthesis", method, options)
    if "steps" in given:
        shown = given["batch"] if "conditioning" in given else count  # one generator for all images sees a batch a step
        return float(LEARNING * forward * given["steps"] * shown)
    clock = _clock(network)
    began = clock()
    synthesize(network, PROBED_IMAGES, method=method, **options)
    return (clock() - began) * count / PROBED_IMAGES


def seconds_of_an_image(network: Network) -> float:
    """Processor seconds, on a GPU seconds, of one image in the float network."""
    images, clock = torch.zeros((at_once(network, TIMED), *network.input_shape), device=network.device), _clock(network)
    network(images).cpu()
    began, runs = clock(), 0
    while runs == 0 or clock() - began < PROBED_SECONDS:
        network(images).cpu()  # which waits for it
        runs += 1
    return (clock() - began) / (runs * len(images))


def _clock(network: Network) -> Callable[[], float]:
    return time.process_time if network.device == CPU else time.perf_counter


def _options(family: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A method's options, those not given at their defaults."""
    return {key: parameter.default for key, parameter in find_method(family, name).options.items()} | given
