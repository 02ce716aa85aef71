"""Genie-M: block by block, scales and rounding of weights together."""

from __future__ import annotations

from pathlib import Path

from dreamquant.quantization.student import Student
from dreamquant.reconstruction._loop import Callback, Schedule, reconstruct_units, unit_name
from dreamquant.samples import Samples

PAPER = "Jeon et al., Genie: Show Me the Data for Quantization (CVPR 2023), arXiv 2212.04780"
BUDGETS = {
    "standard": {"steps": 500, "batch": 16, "learning_rate": 4e-3, "scale_rate": 4e-4, "activation_rate": 4e-4},
    "quick": {"steps": 150, "batch": 16, "learning_rate": 1e-2, "scale_rate": 1e-3, "activation_rate": 1e-3},
}


def genie_m(
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    steps: int = 20_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    scale_rate: float = 1e-4,
    activation_rate: float = 4e-5,
    regulariser: float = 1.0,
    warm_up: float = 0.2,
    drop: float = 0.5,
    unit: str = "segment",
    memory: float = 4.0,
) -> Student:
    """Learns rounding and scale of each block's weights and the steps of its activations together, under QDrop.

    The whole part of each weight is found once and held (eq. 8), which keeps the rounding and the scale from fighting each other.
    """
    schedule = Schedule(
        steps=steps,
        unit=unit_name(unit),
        weights="rounding and scale",
        activations="learned",
        batch=batch,
        rounding_rate=learning_rate,
        scale_rate=scale_rate,
        activation_rate=activation_rate,
        weight=regulariser,
        warm_up=warm_up,
        drop=drop,
        memory=memory,
    )
    return reconstruct_units(student, samples.images, [schedule], seed=seed, callback=callback, folder=folder)
