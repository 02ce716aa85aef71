"""GDFQ: a generator and the student learn side by side."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training._loop import QUICK, STANDARD, Callback, Phase, Schedule, train_student
from dreamquant.training._losses import Plain
from dreamquant.training._sources import Dreams, Maker

PAPER = "Xu et al., Generative Low-bitwidth Data Free Quantization (ECCV 2020), arXiv 2003.03603"
REDUCTION = {"reduction": "batchmean"}  # as released it is a tenth of that for ten classes: too little for so few steps
BUDGETS = {"standard": STANDARD | REDUCTION, "quick": QUICK | REDUCTION}


def gdfq(
    network: Network,
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    epochs: int = 400,
    iterations: int = 200,
    batch: int = 16,
    learning_rate: float = 1e-6,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    milestones: str = "100,200,300",
    warm_up: int = 50,
    range_epochs: int = 4,
    weight: float = 1.0,
    temperature: float = 20.0,
    reduction: str = "mean",  # over the batch and the classes, as released; "batchmean" is the divergence itself
    generator_rate: float = 1e-3,
    statistics_weight: float = 0.1,
    latent: int = 100,
    width: int = 128,
    conditioning: str = "batchnorm",
    clip: float = 0.0,
    patience: int = 0,
) -> Student:
    """Trains the student on a generator's images, by cross entropy and distillation, while the generator goes on learning.

    Generator: eq. 5, cross entropy + statistics_weight * BatchNorm statistics. Student: eq. 7, cross entropy + weight * T^2 KL.
    Published for ImageNet; for CIFAR-100 batch=200, learning_rate=1e-4, warm_up=4, conditioning=embedding. The samples only
    serve the stopping rule.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(
        epochs, iterations, warm_up, range_epochs, learning_rate, momentum, weight_decay, milestones, clip, patience
    )
    dreams = Dreams(network, generator, Maker(batch, generator_rate, statistics_weight, latent, width, conditioning))
    return train_student(
        network,
        student,
        samples.images,
        [Phase(epochs, dreams)],
        Plain(weight, temperature, reduction),
        schedule,
        generator=generator,
        callback=callback,
        folder=folder,
    )
