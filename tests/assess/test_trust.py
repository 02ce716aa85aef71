"""The estimate of lost accuracy: told from answers on images that had no part in quantizing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamquant.assess.agreement import Agreement
from dreamquant.assess.probes import Probe, probe, probe_images, stages
from dreamquant.assess.trust import Fit, Trust, against, beyond, from_scale, shipped, to_scale, trust, unlike
from dreamquant.errors import DataError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.scores import scores_classes
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

RANGES, IMAGES = {"procedural": (0.001, 2.0), "dreamt": (0.001, 2.0)}, {"procedural": 256, "dreamt": 32}
FIT = Fit([-3.0, 0.7, -0.5, -0.8], -0.7, 1.1, 90.0, 60, 6, RANGES, (0.3, 0.8), IMAGES)


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


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({}, {}, ""),
        ({}, {"kl": 9.0}, r"On dreamt images the answers are farther from .* \(KL 9\) than in any case .* \(at most 2\)"),
        ({"kl": 5e-4}, {}, r"On procedural images the answers are nearer to .* \(KL 0.0005\) than .* \(at least 0.001\)"),
        ({}, {"samples": 31}, "There are 31 dreamt images to tell it from, and the estimate rests on 32"),
        ({"confidence": 0.82}, {}, ""),  # of 256 images a mean is known to 0.03
        ({"confidence": 0.84}, {}, r"is surer of procedural images \(mean confidence 0.84\) than any .* \(at most 0.80\)"),
        ({"confidence": 0.26}, {}, r"is less sure of procedural images .* \(at least 0.30\)"),
    ],
)
def test_what_the_fit_has_not_seen_is_said(first: dict[str, Any], second: dict[str, Any], says: str) -> None:
    one, other = answers(0.1)
    found = beyond([replace(one, **first), replace(other, **second)], FIT)
    assert len(found) == bool(says)
    assert re.search(says, " ".join(found))


def test_networks_that_it_says_nothing_of(network: Network, transformer_module: torch.nn.Module) -> None:
    assert unlike(network) == []
    space = network.space
    for changed, says in (
        (replace(network, space=replace(space, known="measured")), "only measured"),
        (replace(network, space=replace(space, doubt="its BatchNorm differs")), "doubtful: its BatchNorm differs"),
        (replace(network, outputs=(replace(network.outputs[0], known="shape"),)), "is not known"),
        (replace(network, outputs=(replace(network.outputs[0], kind="values"),)), "no answer can be right or wrong"),
        (load(transformer_module, input_shape=(3, 12, 8), outputs={"output": "classes"}), "attention"),
    ):
        found = unlike(changed)
        assert len(found) == 1
        assert says in found[0]


@pytest.mark.parametrize(
    ("top1", "cost", "denied"),
    [(100.0, 0.0, False), (50.0, 1.0, False), (96.875, 1.5, False), (75.0, 20.0, True), (25.0, 70.0, True)],
)
def test_answers_that_cost_more_than_it_allows_deny_it(top1: float, cost: float, denied: bool) -> None:
    told = Trust(0.4, 0.1, 0.9, 90.0, 84, 7)
    found = against(told, Agreement(32, top1, 0.1, confidence=0.9, cost=cost))
    assert bool(found) is denied
    assert not denied or f"{cost:.1f} % of its right answers" in found[0]
    assert not against(replace(told, high=90.0), Agreement(32, top1, 0.1, confidence=0.9, cost=cost))


def test_the_fit_that_ships_rests_on_enough() -> None:
    fit = shipped()
    assert fit.networks >= 4
    assert fit.cases >= 16
    assert fit.below < 0 < fit.above
    assert fit.weights[1] > 0
    assert set(fit.ranges) == set(fit.images) == set(stages("rsd"))
    assert fit.images == {name: count for name, (_, count, _) in stages("rsd").items()}


def test_the_probes_are_dreamt_by_another(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Samples] = {}

    def once(network: Network, count: int, *, method: str, **options: Any) -> Samples:
        if method not in made:
            made[method] = synthesize(network, count, method=method, **options)
        return made[method]

    monkeypatch.setattr("dreamquant.assess.probes.synthesize", once)
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
