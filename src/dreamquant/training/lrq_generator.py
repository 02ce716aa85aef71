"""LRQ as its abstract reads: the long-range generator drives the training."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training._loop import QUICK, STANDARD, Callback, Phase, Schedule, train_student
from dreamquant.training._losses import Decoupled
from dreamquant.training._sources import Dreams, Maker

PAPER = "Long-Range Zero-Shot Generative Deep Network Quantization (Neural Networks 166, 2023), arXiv 2211.06816"
BUDGETS = {"standard": STANDARD, "quick": QUICK}


def lrq_generator(
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
    """Trains the student on the images of a generator with long-range attention, by cross entropy and decoupled distillation.

    `gdfq`'s loop with the released generator and loss, at the released code's rates for ImageNet; for CIFAR batch=256,
    learning_rate=1e-4, milestones=20,40,60. What was released trains on fixed samples: `lrq`. The samples only serve the
    stopping rule.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(
        epochs, iterations, warm_up, range_epochs, learning_rate, momentum, weight_decay, milestones, clip, patience
    )
    maker = Maker(batch, generator_rate, statistics_weight, latent, width, conditioning, attention=True)
    return train_student(
        network,
        student,
        samples.images,
        [Phase(epochs, Dreams(network, generator, maker))],
        Decoupled(alpha, beta, temperature),
        schedule,
        generator=generator,
        callback=callback,
        folder=folder,
    )
