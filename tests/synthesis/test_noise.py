"""Noise has the statistics of the input space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dreamquant.network.graph import Network
from dreamquant.network.input_space import NATURAL_MEAN, NATURAL_STD, of_pixels
from dreamquant.synthesis import synthesize


@pytest.mark.parametrize("known", [False, True])
def test_moments_are_those_of_the_input_space(residual: Network, known: bool) -> None:
    mean, std = (0.4, 0.5, 0.3), (0.25, 0.2, 1.0)
    network = replace(residual, space=of_pixels(mean, std)) if known else residual
    images = synthesize(network, 200, method="noise").images
    if known:  # back to pixels, these are photographs' statistics
        images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    wanted = (NATURAL_MEAN, NATURAL_STD) if known else ((0.0,) * 3, (1.0,) * 3)

    assert images.mean((0, 2, 3)).tolist() == pytest.approx(wanted[0], abs=0.03)
    assert images.std((0, 2, 3)).tolist() == pytest.approx(wanted[1], rel=0.03)
