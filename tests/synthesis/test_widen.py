"""Few images become many: themselves, their mirror images, and procedural scenes with a part of one of them in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreamquant.flow import run
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.samples import Samples
from dreamquant.synthesis import WIDENED, synthesize, widened


def test_mirror_images_and_scenes_are_added(residual: Network) -> None:
    samples = synthesize(residual, 3, method="rsd", steps=2, seed=4)
    found = widened(residual, samples)

    assert len(found) == WIDENED * 3
    assert torch.equal(found.images[:3], samples.images)
    assert torch.equal(found.images[3:6], samples.images.flip(3))
    assert found.images[6:].flatten(1).unique(dim=0).shape[0] == 6
    assert found.labels is None
    assert found.confidence is None
    assert (found.method, found.seed, found.options) == (samples.method, samples.seed, samples.options)


@pytest.fixture
def wide(fill: Callable[..., Any]) -> Network:
    return capture(fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 38 * 28, 5)), (3, 40, 30)), (3, 40, 30))


def test_a_scene_shows_a_piece_of_an_image_or_a_smaller_mirror_image(wide: Network) -> None:
    rows, columns = torch.arange(40.0).view(-1, 1) + 100, torch.arange(30.0) + 100  # far from what procedural images hold
    image = torch.stack([rows.expand(40, 30), columns.expand(40, 30), torch.zeros(40, 30)])
    images = image.expand(6, 3, 40, 30).clone()
    scenes = widened(wide, Samples(images, seed=3)).images[12:]

    assert len(scenes) == 12
    places = set()
    for number, scene in enumerate(scenes):
        shown = (scene[0] > 50).nonzero()
        (top, left), (bottom, right) = shown.amin(0).tolist(), shown.amax(0).tolist()
        height, width = bottom - top + 1, right - left + 1
        places.add((top, left))
        assert len(shown) == height * width  # a rectangle
        assert 0.45 * 40 - 1 < height < 0.85 * 40 + 1
        assert 0.45 * 30 - 1 < width < 0.85 * 30 + 1
        part = scene[:2, top : bottom + 1, left : right + 1]
        down, across = part[0, :, 0], part[1, 0]
        if number < 6:  # a piece: pixel by pixel
            assert torch.equal(down.diff(), torch.ones(height - 1))
            assert torch.equal(across.diff(), torch.ones(width - 1))
        else:  # the whole of it, smaller, from the right to the left
            assert down[0] < 103 < 136 < down[-1]
            assert across[0] > 126 > 103 > across[-1]
    assert len(places) > 6


def test_what_stands_behind_is_not_what_dreams_begin_from(residual: Network) -> None:
    starts = synthesize(residual, 8, method="fractal", seed=0)
    others = widened(residual, synthesize(residual, 4, method="noise", seed=0)).images[8:]

    assert torch.cdist(starts.images.flatten(1), others.flatten(1)).min() > 1


def test_the_same_seed_gives_the_same_images_and_another_gives_others(residual: Network) -> None:
    first, same, other = (widened(residual, synthesize(residual, 2, method="noise", seed=seed)).images for seed in (0, 0, 1))

    assert torch.equal(first, same)
    assert not torch.isclose(first, other).flatten(1).all(1).any()


def test_a_run_that_is_told_so_calibrates_on_all_of_them(residual_module: Any, tmp_path: Path) -> None:
    settings = ["synthesis.count=4", "synthesis.held_out=2", "synthesis.widen=true"]
    result = run(
        residual_module, tmp_path / "out.onnx", recipe="noise", settings=settings, input_shape=(3, 11, 9), estimate=False
    )

    assert len(result.samples) == 16
    assert result.recipe.synthesis.widen
