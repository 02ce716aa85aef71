"""Training: a fake-quantized student learns what its float teacher answers, on images that were dreamt. One file a method.

The contract: `name(network, student, samples, *, seed, callback, folder, ...) -> Student`, a student of its own whose weights,
biases, and scales and shifts of BatchNorms were trained with the float `network` as teacher, on `samples` or on the images of a
generator that is trained beside it. It is the student after the last epoch: none is chosen. The same seed gives the same bits on
one machine, also where a run was stopped and goes on from the epochs in `folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamquant.errors import DataError, OptionError, unknown
from dreamquant.methods import BUDGETS, check_seed, find_method
from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training._loop import Callback


def train(
    network: Network,
    student: Student,
    samples: Samples,
    *,
    method: str,
    seed: int = 0,
    callback: Callback | None = None,
    folder: Path | None = None,
    budget: str = "paper",
    **options: Any,
) -> Student:
    """The student trained by a method's name; `options` are the method's own.

    What is not given is as published, or with the budgets `standard` and `quick` for a processor. The state after each epoch is
    kept in `folder`, and a run with the same settings goes on from it. Raises `OptionError` for what is not known and for a
    network that scores no classes, `DataError` for samples that do not fit the network.
    """
    found, seed = find_method("training", method), check_seed(seed)
    if budget not in BUDGETS:
        raise OptionError(unknown("budget", budget, BUDGETS))
    if tuple(samples.images.shape[1:]) != network.input_shape or not len(samples):
        raise DataError(
            f"samples are {tuple(samples.images.shape)}; the network takes (N, {', '.join(map(str, network.input_shape))})"
        )
    options = found.budget(budget) | found.check_options(options)
    result: Student = found.function(network, student, samples, seed=seed, callback=callback, folder=folder, **options)
    return result
