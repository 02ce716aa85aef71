"""AdaRound: layer by layer, up or down."""

from __future__ import annotations

from pathlib import Path

from dreamquant.quantization.student import Student
from dreamquant.reconstruction._loop import Callback, Schedule, reconstruct_units
from dreamquant.samples import Samples

PAPER = "Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020), arXiv 2004.10568"
BUDGETS = {  # in so few steps the published weight of the regulariser leaves a third of the roundings undecided
    "standard": {"steps": 500, "batch": 16, "learning_rate": 4e-3, "regulariser": 1.0},
    "quick": {"steps": 150, "batch": 16, "learning_rate": 1e-2, "regulariser": 1.0},
}


def adaround(
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    steps: int = 10_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    regulariser: float = 0.01,
    warm_up: float = 0.2,
    memory: float = 4.0,
) -> Student:
    """Rounds each layer's weights up or down for the least error of the layer's output, steps as they were found.

    The input is the quantized prefix's, the target the float network's, both behind the activation function (eq. 25); activations
    are not quantized meanwhile.
    """
    schedule = Schedule(
        steps=steps,
        unit="layer",
        weights="rounding",
        activations="off",
        batch=batch,
        rounding_rate=learning_rate,
        weight=regulariser,
        warm_up=warm_up,
        memory=memory,
    )
    return reconstruct_units(student, samples.images, [schedule], seed=seed, callback=callback, folder=folder)
