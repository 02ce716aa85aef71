"""Synthesis: a network dreams the images that it is calibrated on. One file a method.

The contract: `name(network, count, *, seed, callback, ...) -> Samples` of `count` images (N, C, H, W), float32, in the network's
input space. The same seed gives the same bits on one machine. The network is left as it was found. A method that needs
BatchNorm statistics says so (`NEEDS_BATCHNORM = True`) and is refused, with a sentence, on a network without any.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import replace
from typing import Any

from dreamquant.errors import DreamQuantError, ModelError, OptionError, unknown
from dreamquant.limits import check_memory
from dreamquant.methods import BUDGETS, Method, check_seed, checked_count, find_method, method_names
from dreamquant.network.attention import attentions
from dreamquant.network.graph import Network
from dreamquant.network.outputs import class_output
from dreamquant.network.scores import class_probabilities, float_answers
from dreamquant.network.statistics import batch_norms
from dreamquant.plain import plain_torch
from dreamquant.samples import Samples, are_finite
from dreamquant.synthesis._loop import Callback
from dreamquant.synthesis._widen import WIDENED, widened

__all__ = ["WIDENED", "Samples", "check_fed", "lacking", "needs_batchnorm", "synthesize", "widened"]
IMAGE_COPIES, FLOAT_BYTES = 4, 4  # the images, their gradient and what an optimizer knows of each value


@plain_torch()
def synthesize(
    network: Network,
    count: int,
    *,
    method: str = "rsd",
    seed: int = 0,
    callback: Callback | None = None,
    budget: str = "paper",
    confidence: bool = True,
    **options: Any,
) -> Samples:
    """`count` images by a method's name; `options` are the method's own.

    What is not given is as published, or with the budgets `standard` and `quick` as in the method's `BUDGETS`: a fraction of
    the steps. With `confidence` the network is asked how sure it is of each image. Raises `ModelError` where it is not known what
    numbers the network is fed, `OptionError` for an unknown method or option, for a count below 1, a seed that no generator
    takes, and a method that needs BatchNorm statistics where the network has none; `DreamQuantError`
    when the images are not finite.
    """
    found = find_method("synthesis", method)
    count, seed = checked_count("count", count), check_seed(seed)
    if count < 1:
        raise OptionError(f"count is {count}; at least one image is needed")
    check_images(network, count, made_apart=getattr(found.module, "MADE_APART", False))
    lack = lacking(found, network)
    if lack:
        usable = [name for name in method_names("synthesis") if not lacking(find_method("synthesis", name), network)]
        raise OptionError(
            f"synthesis method {method!r} {lack} in {network.source.text}; methods that work on it: {', '.join(usable)}"
        )
    if budget not in BUDGETS:
        raise OptionError(unknown("budget", budget, BUDGETS))
    check_fed(network)
    options = found.budget(budget) | found.check_options(options)
    samples: Samples = found.function(network, count, seed=seed, callback=callback, **options)
    if not are_finite(samples.images):
        raise DreamQuantError(
            f"the images of synthesis method {method!r} are not finite; it was run with {options or 'its defaults'}"
        )
    samples = replace(samples, images=network.space.snapped(samples.images))
    asked = confidence and class_output(network.outputs) is not None
    probabilities = class_probabilities(network, float_answers(network, samples.images)) if asked else None
    sure = None if probabilities is None else probabilities.amax(1)
    return replace(samples, method=method, seed=seed, options=options, confidence=sure)


def check_fed(network: Network) -> None:
    """`ModelError` where it is not known what numbers a network is fed, and so not what images to make for it."""
    if not network.space.is_known:
        raise ModelError(f"{network.source.text}: {network.space.because}")


def check_images(network: Network, count: int, *, made_apart: bool = False) -> None:
    """`OptionError` where so many images, and what is kept beside them while they are made, take more memory than the limit; of
    images that are made one by one, and lie in files where there are many, where one does, or the disk has no room."""
    one = IMAGE_COPIES * math.prod(network.input_shape) * FLOAT_BYTES
    filed = made_apart and count * one <= shutil.disk_usage(tempfile.gettempdir()).free
    check_memory(one if filed else count * one, f"{count} images {network.input_shape}", OptionError)


def lacking(method: Method, network: Network) -> str:
    """What a synthesis method would need that a network does not have; empty where it can work."""
    if needs_batchnorm(method) and not batch_norms(network):
        return "needs BatchNorm statistics, and there are none (folded, or never there)"
    if getattr(method.module, "NEEDS_ATTENTION", False) and not attentions(network):
        return "needs attention, and there is no softmax between two products of computed tensors"
    return ""


def needs_batchnorm(method: Method) -> bool:
    """Whether a synthesis method can only work on a network with BatchNorms."""
    return bool(method.module.NEEDS_BATCHNORM)
