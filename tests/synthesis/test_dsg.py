"""DSG's images keep within a slack of the statistics and each nears those of a layer of its own, so they differ more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dreamquant.synthesis.dsg
import dreamquant.synthesis.zeroq
from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.statistics import batch_norms, moments, probe
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.synthesis.dsg import _correlation

STATISTICS = {"class_weight": 0.0, "variation_weight": 0.0, "norm_weight": 0.0}  # and nothing else


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, **options: Any) -> Samples:
    """An image for each of the trained network's nine BatchNorms."""
    return synthesize(network, 9, method="dsg", steps=40, **{"slack": False, "enhance": False, **STATISTICS, **options})


@pytest.fixture(scope="module")
def plain(trained: Network) -> Samples:
    """Without slack, without enhancement."""
    return dream(trained)


@pytest.fixture(scope="module")
def loose(trained: Network) -> Samples:
    """With slack, without enhancement."""
    return dream(trained, slack=True)


def gaps(network: Network, images: Tensor) -> Tensor:
    """Squared distances (N, layers) of each image's statistics to those of the BatchNorms."""
    with torch.no_grad():
        found = [moments(feature, per_sample=True) for feature in probe(network)(images).features]
    return torch.stack(
        [
            (mean - target.mean).square().sum(1) + (std - target.std).square().sum(1)
            for (mean, std), target in zip(found, batch_norms(network), strict=True)
        ],
        1,
    )


def spread(network: Network, images: Tensor) -> float:
    """How far the images' statistics are from each other's, as a mean over layers and channels."""
    with torch.no_grad():
        found = [moments(feature, per_sample=True) for feature in probe(network)(images).features]
    return sum((mean.std(0).mean() + std.std(0).mean()).item() for mean, std in found) / len(found)


def test_without_what_it_adds_it_is_zeroq(residual: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    start = synthesize(residual, 3, method="noise").images
    for module in (dreamquant.synthesis.dsg, dreamquant.synthesis.zeroq):
        monkeypatch.setattr(module, "first_images", lambda *_: start.clone().requires_grad_())
    settings = {"steps": 8, "learning_rate": 0.1, "patience": 100}
    bare = {"slack": False, "enhance": False, **STATISTICS}
    zeroq = synthesize(residual, 3, method="zeroq", **settings)
    dsg = synthesize(residual, 3, method="dsg", **settings, **bare)

    assert dsg.losses == pytest.approx(zeroq.losses, rel=1e-4)
    torch.testing.assert_close(dsg.images, zeroq.images, rtol=1e-2, atol=1e-3)
    for name, added in {"slack": True, "enhance": True, **dict.fromkeys(STATISTICS, 1.0)}.items():
        other = synthesize(residual, 3, method="dsg", **{**settings, **bare, name: added, "steps": 1})
        assert abs(other.losses[0] / zeroq.losses[0] - 1) > 0.01, name


def test_gaps_within_the_slack_cost_nothing_and_let_the_images_differ(trained: Network, plain: Samples, loose: Samples) -> None:
    noise = synthesize(trained, 9, method="noise").images

    assert loose.losses[-1] < 0.1 * plain.losses[-1]
    assert 2 * gaps(trained, plain.images).mean() < gaps(trained, loose.images).mean() < gaps(trained, noise).mean()
    assert spread(trained, loose.images) > 1.25 * spread(trained, plain.images)  # less homogenization


def test_the_slack_grows_with_the_percentile(trained: Network) -> None:
    losses = [
        synthesize(trained, 4, method="dsg", steps=1, percentile=percentile, **STATISTICS).losses[0]
        for percentile in (0.1, 0.5, 0.9, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.2 * losses[-1]


def test_the_slack_is_measured_on_the_same_noise_for_any_count(trained: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def slack(**options: Any) -> list[Tensor]:
        seen: list[Tensor] = []

        def watched(features: Tensor, *, per_sample: bool) -> tuple[Tensor, Tensor]:
            found = moments(features, per_sample=per_sample)
            if not per_sample:
                assert len(features) == options.get("slack_images", 64)
                seen.extend(found)
            return found

        monkeypatch.setattr(dreamquant.synthesis.dsg, "moments", watched)
        synthesize(trained, method="dsg", steps=1, **{**STATISTICS, **options})
        return seen

    few, many, fewer_images = slack(count=2), slack(count=70), slack(count=2, slack_images=8)
    assert len(few) == len(many) == 2 * len(batch_norms(trained))
    torch.testing.assert_close(few, many)
    assert not torch.allclose(few[0], fewer_images[0], rtol=1e-3)


def test_each_sample_is_nearest_where_it_is_enhanced(trained: Network, plain: Samples) -> None:
    enhanced, found = (gaps(trained, samples.images) for samples in (dream(trained, enhance=True), plain))
    own = torch.arange(9), torch.arange(9)  # sample j at layer j
    shares = [(distances / distances.sum(1, keepdim=True))[own].mean() for distances in (enhanced, found)]

    assert enhanced[own].mean() < 0.9 * found[own].mean()
    assert shares[0] < 0.85 * shares[1]


def test_layers_are_dealt_out_again_where_there_are_more_samples(residual: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    start = synthesize(residual, 7, method="noise").images
    monkeypatch.setattr(dreamquant.synthesis.dsg, "first_images", lambda *_: start.clone().requires_grad_())
    enhanced, plain = (
        synthesize(residual, 7, method="dsg", steps=1, slack=False, enhance=enhance, **STATISTICS).losses[0]
        for enhance in (True, False)
    )
    own = gaps(residual, start)[torch.arange(7), torch.arange(7) % 5]

    assert enhanced - plain == pytest.approx(own.mean().item(), rel=1e-3)


def test_inhibited_images_are_others_and_finite(trained: Network) -> None:
    with_it, without = (
        synthesize(trained, 8, method="dsg", steps=20, inhibit=inhibit, learning_rate=0.1) for inhibit in (True, False)
    )
    noise = synthesize(trained, 8, method="noise").images

    assert bool(with_it.images.isfinite().all())
    assert not torch.allclose(with_it.images, without.images, atol=1e-2)
    assert _correlation(with_it.images, noise).isfinite()


def test_correlation_is_nothing_for_noise_itself_and_much_for_one_image_repeated(trained: Network) -> None:
    noise, other = (synthesize(trained, 6, method="noise", seed=seed).images for seed in (0, 1))
    alike = (other[:1] + 0.01 * other).requires_grad_()
    found = _correlation(alike, noise)
    found.backward()  # type: ignore[no-untyped-call]

    assert _correlation(noise, noise).item() == pytest.approx(0, abs=1e-6)
    assert found > 0.1
    assert alike.grad is not None
    assert bool(alike.grad.isfinite().all())
    assert bool(alike.grad.any())


def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network) -> None:
    samples = synthesize(trained, 10, method="dsg", steps=40)

    assert samples.labels is not None
    assert sorted(samples.labels.tolist()) == list(range(10))  # spread evenly
    assert (trained(samples.images).argmax(1) == samples.labels).float().mean() >= 0.9
    assert samples.losses[-1] < 0.3 * samples.losses[0]


@pytest.mark.parametrize(
    ("option", "value"), [("percentile", 0.0), ("percentile", 1.1), ("percentile", -0.5), ("slack_images", 0)]
)
def test_impossible_options_are_refused(residual: Network, option: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"dsg\.{option} is {value}"):
        synthesize(residual, 2, method="dsg", **{option: value})
