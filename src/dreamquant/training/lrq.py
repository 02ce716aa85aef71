"""LRQ as its released code runs it: hard samples train the student, a long-range generator sets its ranges."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training._loop import QUICK, STANDARD, Callback, Phase, Schedule, split, train_student
from dreamquant.training._losses import Decoupled
from dreamquant.training._sources import Dreams, FixedSet, Maker

PAPER = "Long-Range Zero-Shot Generative Deep Network Quantization (Neural Networks 166, 2023), arXiv 2211.06816"
BUDGETS = {"standard": STANDARD | {"warm_up": 4, "range_epochs": 4}, "quick": QUICK | {"warm_up": 3, "range_epochs": 3}}


def lrq(
    network: Network,
    student: Student,
    samples: Samples,
    *,
    seed: int,
    callback: Callback | None = None,
    folder: Path | None = None,
    epochs: int = 151,
    iterations: int = 200,
    batch: int = 16,
    learning_rate: float = 1e-6,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    milestones: str = "100,200,350",
    warm_up: int = 4,
    range_epochs: int = 4,
    crop: float = 0.5,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    generator_rate: float = 1e-3,
    statistics_weight: float = 0.1,
    latent: int = 100,
    width: int = 128,
    conditioning: str = "batchnorm",
    clip: float = 0.0,
    patience: int = 0,
) -> Student:
    """Trains the student on the samples, cropped and mirrored, by cross entropy and decoupled distillation.

    In the `warm_up` a generator with long-range attention learns, and its images set the ranges of activations; then it is
    dropped. The samples should be those of the synthesis method `lrq`, with labels. Published for ImageNet; for CIFAR batch=256,
    learning_rate=1e-4, milestones=20,40,60. `lrq_generator` trains on the generator instead.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(
        epochs, iterations, warm_up, range_epochs, learning_rate, momentum, weight_decay, milestones, clip, patience
    )
    samples, held_out = split(samples, schedule, generator)
    phases = [Phase(epochs, FixedSet(network, samples, generator, batch=batch, crop=crop))]
    if warm_up:
        maker = Maker(batch, generator_rate, statistics_weight, latent, width, conditioning, attention=True)
        phases.insert(0, Phase(warm_up, Dreams(network, generator, maker)))
    return train_student(
        network,
        student,
        held_out,
        phases,
        Decoupled(alpha, beta, temperature),
        schedule,
        generator=generator,
        callback=callback,
        folder=folder,
    )
