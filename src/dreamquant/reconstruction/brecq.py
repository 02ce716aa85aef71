"""BRECQ: block by block, weights first, then the steps of activations."""

from __future__ import annotations

from pathlib import Path

from dreamquant.quantization.student import Student
from dreamquant.reconstruction._loop import Callback, Schedule, reconstruct_units, unit_name
from dreamquant.samples import Samples

PAPER = "Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (ICLR 2021), arXiv 2102.05426"
BUDGETS = {  # in so few steps the published weight of the regulariser leaves a third of the roundings undecided
    "standard": {
        "steps": 500,
        "batch": 16,
        "activation_steps": 300,
        "learning_rate": 4e-3,
        "regulariser": 1.0,
        "activation_rate": 1e-3,
    },
    "quick": {
        "steps": 150,
        "batch": 16,
        "activation_steps": 100,
        "learning_rate": 1e-2,
        "regulariser": 1.0,
        "activation_rate": 2e-3,
    },
}


def brecq(
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    steps: int = 20_000,
    activation_steps: int = 5_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    activation_rate: float = 4e-4,
    regulariser: float = 0.01,
    warm_up: float = 0.2,
    unit: str = "segment",
    memory: float = 4.0,
) -> Student:
    """Rounds the weights of each block for the least error of the block's output, then learns the steps of its activations.

    Two passes over the network, as published: weights with float activations (eq. 10, without the Fisher weights, as the released
    code's default), then activation steps (LSQ) with the weights held, error to the power 2.4.
    """
    weights = Schedule(
        steps=steps,
        unit=unit_name(unit),
        weights="rounding",
        activations="off",
        batch=batch,
        rounding_rate=learning_rate,
        weight=regulariser,
        warm_up=warm_up,
        memory=memory,
    )
    activations = Schedule(
        steps=activation_steps,
        unit=unit_name(unit),
        weights="fixed",
        activations="learned",
        batch=batch,
        activation_rate=activation_rate,
        power=2.4,
        memory=memory,
    )
    return reconstruct_units(student, samples.images, [weights, activations], seed=seed, callback=callback, folder=folder)
