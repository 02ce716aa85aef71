"""LRQ's long-range generator: GDFQ's with an attention, and it learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize
from dreamquant.synthesis._generators import ClassGenerator, initialised

SMALL = {"width": 16, "latent": 10, "batch": 32, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def trained(digits: Path) -> Network:
    return load(digits / "digits.pt2")


def dream(network: Network, **options: Any) -> Samples:
    return synthesize(network, 64, method="lrq_generator", **{**SMALL, "steps": 60, **options})


@pytest.mark.parametrize(("conditioning", "least"), [("batchnorm", 0.8), ("embedding", 0.2)])  # a tenth by chance
def test_a_trained_network_recognises_the_classes_that_were_asked_for(trained: Network, conditioning: str, least: float) -> None:
    samples = dream(trained, conditioning=conditioning)
    untrained = dream(trained, conditioning=conditioning, steps=1)

    assert samples.labels is not None
    scores = trained(samples.images)
    assert (scores.argmax(1) == samples.labels).float().mean() > least
    assert F.cross_entropy(scores, samples.labels) < 0.7 * F.cross_entropy(trained(untrained.images), untrained.labels)  # type: ignore[arg-type]
    assert sum(samples.losses[-5:]) < 0.6 * sum(samples.losses[:5])


def test_it_is_gdfqs_generator_but_for_the_attention(residual: Network) -> None:
    options = {"steps": 1, "batch": 4, "latent": 4, "width": 4}
    one, other = (synthesize(residual, 4, method=method, **options) for method in ("gdfq", "lrq_generator"))
    assert not torch.allclose(one.images, other.images, atol=1e-2)

    plain, attentive = (ClassGenerator((3, 11, 9), 5, 4, 4, attention=attention) for attention in (False, True))
    initialised(attentive, torch.Generator().manual_seed(0))
    assert plain.load_state_dict(attentive.state_dict(), strict=False).missing_keys == []
    assert attentive.attention is not None
    with torch.no_grad():
        for parameter in attentive.attention.leave.parameters():
            parameter.zero_()
    latents, labels = torch.randn((5, 4), generator=torch.Generator().manual_seed(1)), torch.arange(5)
    torch.testing.assert_close(plain(latents, labels), attentive(latents, labels))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 1}, "batch is 1; the generator's BatchNorms need at least two images"),
        ({"conditioning": "labels"}, r"conditioning is 'labels' \(known: batchnorm, embedding\)"),
    ],
)
def test_impossible_options_are_refused(residual: Network, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        synthesize(residual, 2, method="lrq_generator", **options)
