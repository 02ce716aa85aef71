"""ZeroQ's images have the statistics that BatchNorms remember."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamquant.network.graph import Network
from dreamquant.network.statistics import batch_norms, probe
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._loop import statistics_distance


def distance(network: Network, images: Tensor) -> float:
    with torch.no_grad():
        return statistics_distance(probe(network)(images)[1], batch_norms(network), per_sample=True).item()


def test_the_loss_falls_and_every_image_nears_the_statistics(residual: Network) -> None:
    samples = synthesize(residual, 4, method="zeroq", steps=60)
    noise = synthesize(residual, 4, method="noise")

    assert len(samples.losses) == 60
    assert samples.losses[-1] < 0.1 * samples.losses[0]
    assert distance(residual, samples.images) < 0.5 * distance(residual, noise.images)


def test_it_starts_from_almost_nothing(residual: Network) -> None:
    losses = [synthesize(residual, 2, method="zeroq", steps=1, start_deviation=d).losses[0] for d in (0.0136, 1.0)]

    assert losses[0] > 2 * losses[1]


def test_it_stops_when_nothing_is_gained(residual: Network) -> None:
    samples = synthesize(residual, 2, method="zeroq", steps=400, patience=5, tolerance=0.05)

    assert 10 < len(samples.losses) < 400
