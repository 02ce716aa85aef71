"""DSG in training: GDFQ's loop with a generator whose statistics have slack and whose images differ in what they match."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.training._loop import QUICK, STANDARD, Callback, Phase, Schedule, train_student
from dreamquant.training._losses import Plain
from dreamquant.training._slack import slack_distance
from dreamquant.training._sources import Dreams, Maker

PAPER = "Zhang et al., Diversifying Sample Generation for Accurate Data-Free Quantization (CVPR 2021), arXiv 2103.01049"
REDUCTION = {"reduction": "batchmean"}  # as released it is a tenth of that for ten classes: too little for so few steps
KEPT = {"range_epochs": 0}  # the samples' ranges, which in so few steps the generator's only make worse
BUDGETS = {"standard": STANDARD | REDUCTION | KEPT, "quick": QUICK | REDUCTION | KEPT}


def dsg_qat(
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
    reduction: str = "mean",
    generator_rate: float = 1e-3,
    statistics_weight: float = 0.1,
    percentile: float = 0.9,
    slack_images: int = 64,  # not published
    enhance: bool = True,
    latent: int = 100,
    width: int = 128,
    conditioning: str = "batchnorm",
    clip: float = 0.0,
    patience: int = 0,
) -> Student:
    """Trains as `gdfq`, on a generator that matches BatchNorm statistics within a slack, each image closest at its own layer.

    L_G = cross entropy + statistics_weight * `slack_distance`. Rates are those published for ImageNet (there are no others). The
    hinge and the enhanced samples are the paper's, not the released code's; the journal version's correlation inhibition is not
    here. The samples only serve the stopping rule.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(
        epochs, iterations, warm_up, range_epochs, learning_rate, momentum, weight_decay, milestones, clip, patience
    )
    distance = slack_distance(network, generator, percentile=percentile, images=slack_images, enhance=enhance)
    maker = Maker(batch, generator_rate, statistics_weight, latent, width, conditioning)
    dreams = Dreams(network, generator, maker, distance, f"slack {percentile} on {slack_images}, enhance {enhance}")
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
