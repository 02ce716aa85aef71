"""QDrop: block by block, weights and activation steps together, quantization dropped at random."""

from __future__ import annotations

from pathlib import Path

from dreamquant.quantization.student import Student
from dreamquant.reconstruction._loop import Callback, Schedule, reconstruct_units, unit_name
from dreamquant.samples import Samples

PAPER = "Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit PTQ (ICLR 2022), arXiv 2203.05740"
BUDGETS = {  # in so few steps the published weight of the regulariser leaves a third of the roundings undecided
    "standard": {"steps": 500, "batch": 16, "learning_rate": 4e-3, "regulariser": 1.0, "activation_rate": 4e-4},
    "quick": {"steps": 150, "batch": 16, "learning_rate": 1e-2, "regulariser": 1.0, "activation_rate": 1e-3},
}


def qdrop(
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    steps: int = 20_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    activation_rate: float = 4e-5,
    regulariser: float = 0.01,
    warm_up: float = 0.2,
    drop: float = 0.5,
    unit: str = "segment",
    memory: float = 4.0,
) -> Student:
    """Rounds the weights of each block and learns its activation steps at once, half of all activations left in float at random.

    Half of the elements of the block's input are the float network's (Algorithm 1), so that the rounding found is flat in the
    direction of the activations' own error.
    """
    schedule = Schedule(
        steps=steps,
        unit=unit_name(unit),
        weights="rounding",
        activations="learned",
        batch=batch,
        rounding_rate=learning_rate,
        activation_rate=activation_rate,
        weight=regulariser,
        warm_up=warm_up,
        drop=drop,
        memory=memory,
    )
    return reconstruct_units(student, samples.images, [schedule], seed=seed, callback=callback, folder=folder)
