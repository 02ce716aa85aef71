"""Few images become many: themselves, their mirror images, and procedural ones that are none of those dreams begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dreamquant.network.graph import Network
from dreamquant.run import run
from dreamquant.synthesis import WIDENED, synthesize, widened


def test_mirror_images_and_procedural_ones_are_added(residual: Network) -> None:
    samples = synthesize(residual, 3, method="rsd", steps=2, seed=4)
    found = widened(residual, samples)

    assert len(found) == WIDENED * 3
    assert torch.equal(found.images[:3], samples.images)
    assert torch.equal(found.images[3:6], samples.images.flip(3))
    assert found.images[6:].flatten(1).unique(dim=0).shape[0] == 6
    assert found.labels is None
    assert found.confidence is None
    assert (found.method, found.seed, found.options) == (samples.method, samples.seed, samples.options)


def test_procedural_images_are_not_those_that_dreams_begin_from(residual: Network) -> None:
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
