"""Histograms count exactly, however many values there are."""

from __future__ import annotations

import pytest
import torch

from dreamquant.quantization.histogram import BINS, counted, summarize

MANY = 2**24 + 7  # float32 counts no further than 2^24


def test_a_part_may_hold_more_values_than_float32_can_count() -> None:
    row = torch.zeros(2 * MANY)
    row[:3] = 1.0

    assert counted(row, 4, 0.0, 1.0).tolist() == [2 * MANY - 3, 0, 0, 3]


def test_a_summary_weighs_every_value() -> None:
    values = torch.zeros(1, MANY)
    values[0, 0], values[0, 1] = -1.0, 1.0
    points, weights = summarize(values)

    assert points.shape == weights.shape == (1, BINS)
    assert weights.sum().item() == MANY
    assert weights.max().item() == MANY - 2


@pytest.mark.parametrize("count", [1, BINS])
def test_few_values_stand_for_themselves(count: int) -> None:
    values = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    points, weights = summarize(values)

    assert torch.equal(points, values)
    assert torch.equal(weights, torch.ones_like(values))
