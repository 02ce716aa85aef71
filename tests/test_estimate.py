"""What a run is expected to take: more for more work, and not wildly off."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dreamquant.assess.probes import stages
from dreamquant.estimate import expected_seconds, seconds_of_an_image
from dreamquant.flow import run
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.recipe import Recipe, load_recipe, resolve
from dreamquant.synthesis import synthesize

MODULE = "dreamquant.estimate.seconds_of_an_image"


def recipe(*settings: str, bits: str = "W8A8") -> Recipe:
    return resolve(load_recipe("auto"), has_batchnorm=True, bits=bits, settings=settings)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, lambda _: 1.0)


@pytest.mark.usefixtures("second")
def test_more_work_is_expected_to_take_longer(residual: Network) -> None:
    few = expected_seconds(residual, recipe("synthesis.steps=10"))
    assert expected_seconds(residual, recipe("synthesis.steps=20")) > 1.5 * few
    assert expected_seconds(residual, recipe("synthesis.steps=10", "synthesis.count=200")) > 1.5 * few
    assert expected_seconds(residual, recipe(bits="W4A4")) > few
    longer, shorter = (recipe(f"reconstruction.steps={steps}", bits="W4A4") for steps in (4000, 100))
    assert expected_seconds(residual, longer) > 2 * expected_seconds(residual, shorter)
    assert expected_seconds(residual, recipe("synthesis.method=noise")) < few


@pytest.mark.usefixtures("second")
def test_every_stage_is_counted(residual: Network) -> None:
    plain = expected_seconds(residual, recipe())
    assert expected_seconds(residual, recipe(), stages("rsd").values()) > plain  # images and answers that tell the loss
    assert expected_seconds(residual, recipe("allocation.method=hybrid")) > plain + 100
    trained, longer = (
        expected_seconds(residual, resolve(load_recipe("gdfq"), has_batchnorm=True, settings=[f"training.epochs={epochs}"]))
        for epochs in (10, 20)
    )
    assert longer - trained > plain


@pytest.mark.usefixtures("second")
def test_a_generator_that_all_images_share_is_learnt_once(residual: Network) -> None:
    given = [f"quantization.{name}=none" for name in ("bias_correction", "spare")]  # nothing is chosen on all images
    given += ["quantization.activation_ranges=minmax", "synthesis.method=gdfq"]
    few, many = (expected_seconds(residual, recipe(*given, f"synthesis.count={count}")) for count in (64, 256))
    assert many < 1.1 * few


def test_the_time_of_an_image_is_measured(digits: Path) -> None:
    assert 1e-7 < seconds_of_an_image(load(digits / "digits.pt2")) < 1.0


def test_dreaming_takes_what_is_expected_to_a_factor_of_ten(digits: Path) -> None:
    network = load(digits / "digits.pt2")
    chosen = recipe("synthesis.count=64", "synthesis.held_out=1", "synthesis.steps=20")
    expected = expected_seconds(network, chosen)
    began = time.process_time()
    synthesize(network, 64, method="rsd", **chosen.synthesis.options)
    assert 0.1 < (time.process_time() - began) / expected < 10


def test_what_will_be_done_is_said_before_it_is(digits: Path, tmp_path: Path) -> None:
    said: list[str] = []
    few = ["synthesis.count=4", "synthesis.held_out=4"]
    run(digits / "digits_bnfolded.onnx", tmp_path / "out.onnx", settings=few, announce=said.append)
    assert len(said) == 3  # what it is fed, what it answers, what will be done
    assert "recipe auto (6 bits or more and no BatchNorm statistics" in said[-1]
    assert "4 images by fractal, W8A8 by plan deploy; about" in said[-1]
