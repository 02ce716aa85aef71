"""Reconstruction: weights rounded, and steps chosen, for what a unit of layers puts out. One file a method.

The contract: `name(student, samples, *, seed, callback, folder, ...) -> Student`, a student of its own that computes more nearly
what the float network does on the samples. The same seed gives the same bits on one machine, also where a run was stopped and
goes on from the units in `folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamquant.errors import OptionError, unknown
from dreamquant.methods import BUDGETS, check_seed, find_method
from dreamquant.quantization.student import Student
from dreamquant.reconstruction._loop import Callback
from dreamquant.samples import Samples


def reconstruct(
    student: Student,
    samples: Samples,
    *,
    method: str = "genie_m",
    seed: int = 0,
    callback: Callback | None = None,
    folder: Path | None = None,
    budget: str = "paper",
    **options: Any,
) -> Student:
    """The student with its weights rounded, and perhaps its steps chosen, by a method's name; `options` are the method's own.

    What is not given is as published, or with the budgets `standard` and `quick` a fraction of the steps. Units that are done are
    kept in `folder`, and a run with the same settings goes on from them. Raises `OptionError` for what is not known.
    """
    found, seed = find_method("reconstruction", method), check_seed(seed)
    if budget not in BUDGETS:
        raise OptionError(unknown("budget", budget, BUDGETS))
    options = found.budget(budget) | found.check_options(options)
    result: Student = found.function(student, samples, seed=seed, callback=callback, folder=folder, **options)
    return result
