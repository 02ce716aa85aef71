"""The estimate of lost accuracy: told from answers on images that had no part in quantizing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamquant.assess.probes import Probe, probe, probe_images, stages
from dreamquant.assess.trust import Fit, from_scale, shipped, to_scale, trust
from dreamquant.errors import DataError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.scores import scores_classes
from dreamquant.samples import Samples

FIT = Fit([-3.0, 0.7, -0.5, -0.8], -0.7, 1.1, 90.0, 60, 6, {"procedural": (0.001, 2.0), "dreamt": (0.001, 2.0)})


@pytest.fixture(scope="module")
def network(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def answers(kl: float, sure: float = 0.5) -> list[Probe]:
    return [Probe("fractal", 256, 90.0, kl, 3.0, 0.5, sure), Probe("anchored", 32, 90.0, kl, 3.0, 0.5, sure)]


@pytest.mark.parametrize("drop", [0.0, 0.1, 3.0, 50.0, 100.0])
def test_the_scale_goes_back(drop: float) -> None:
    assert from_scale(to_scale(drop)) == pytest.approx(drop, abs=1e-6)


def test_a_gain_counts_as_no_loss() -> None:
    assert to_scale(-3.0) == to_scale(0.0)


def test_the_farther_the_answers_the_larger_the_loss() -> None:
    told = [trust(answers(kl), learned=False) for kl in (0.005, 0.05, 0.5, 1.5)]
    drops = [one.drop for one in told]
    assert drops == sorted(drops)
    assert drops[0] < 2 < 5 < drops[-1]
    for one in told:
        assert one.low <= one.drop <= one.high
        assert not one.warnings


def test_the_less_sure_the_network_the_larger_the_loss() -> None:
    drops = [trust(answers(0.1, sure), learned=False).drop for sure in (0.9, 0.6, 0.3)]
    assert drops == sorted(drops)


def test_it_is_the_fit_that_tells() -> None:
    told = trust(answers(1.0), learned=False, fit=FIT)  # log 1 = 0, and odds of 1: the first weight alone
    assert told.drop == pytest.approx(from_scale(-3.0))
    assert told.low == pytest.approx(from_scale(-3.7))
    assert told.high == pytest.approx(from_scale(-1.9))
    assert trust(answers(1.0), learned=True, fit=FIT).drop == pytest.approx(from_scale(-3.8))
    assert (told.cases, told.networks, told.level) == (60, 6, 90.0)


def test_it_warns_of_what_it_has_not_seen() -> None:
    far = trust([answers(0.1)[0], replace(answers(0.1)[1], kl=9.0)], learned=False, fit=FIT)
    assert len(far.warnings) == 1
    assert "dreamt images" in far.warnings[0]
    assert "at most 2" in far.warnings[0]
    assert "convolutional" in trust(answers(0.1), learned=False, attention=True, fit=FIT).warnings[0]


def test_the_fit_that_ships_rests_on_enough() -> None:
    fit = shipped()
    assert fit.networks >= 4
    assert fit.cases >= 16
    assert fit.below < 0 < fit.above
    assert fit.weights[1] > 0
    assert set(fit.ranges) == set(stages("rsd"))


def test_the_probes_are_dreamt_by_another(network: Network) -> None:
    for method in ("rsd", "anchored", "zeroq", "noise"):
        images = probe_images(network, calibrated_by=method, seed=3)
        assert [len(samples) for samples in images] == [256, 32]
        assert images[0].method == "fractal"
        assert images[1].method != method


class Runner:
    """Stands in for a file that computes `scores`."""

    batch = None

    def __init__(self, scores: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.scores = scores

    def all(self, images: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
        return [self.scores(torch.from_numpy(images)).numpy()]


def test_a_probe_of_the_network_itself_finds_nothing(network: Network) -> None:
    samples = Samples(torch.randn(5, *network.input_shape, generator=torch.Generator().manual_seed(0)), method="noise")
    found = probe(network, Runner(network), samples)  # type: ignore[arg-type]
    assert (found.top1, found.samples, found.method) == (100.0, 5, "noise")
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.shift == pytest.approx(0.0, abs=1e-5)


def test_margin_and_shift_are_of_the_two_best_classes(network: Network) -> None:
    samples = Samples(torch.randn(40, *network.input_shape, generator=torch.Generator().manual_seed(0)), method="noise")
    scores = network(samples.images).detach().numpy()
    ordered = np.sort(scores, axis=1)

    found = probe(network, Runner(lambda images: 2 * network(images)), samples)  # type: ignore[arg-type]
    gap = ordered[:, -1] - ordered[:, -2]
    assert found.margin == pytest.approx(gap.mean(), rel=1e-4)
    assert found.shift == pytest.approx(np.sqrt((gap**2).mean()), rel=1e-4)
    assert found.top1 == 100.0
    assert found.kl > 0


def test_no_estimate_where_there_are_no_classes() -> None:
    network = load(torch.nn.Conv2d(3, 4, 3), input_shape=(3, 8, 8))
    assert not scores_classes(network)
    with pytest.raises(DataError, match="no scores of classes"):
        probe(network, Runner(network), Samples(torch.zeros(2, 3, 8, 8)))  # type: ignore[arg-type]
