"""Ranges and bias correction are those that the outputs bear best, and the careful ones where nothing tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import ModelError, OptionError
from dreamquant.network.capture import capture, noise
from dreamquant.network.graph import Network
from dreamquant.quantization.choice import CORRECTIONS, RANGES, Choice, choose
from dreamquant.quantization.plan import CHOSEN, load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.recipe import load_recipe, resolve
from dreamquant.samples import Samples

SHAPE = (3, 6, 6)


class Plain(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.middle(torch.relu(self.first(x)))).mean((2, 3)))
        return y


@pytest.fixture
def network(fill: Callable[..., nn.Module]) -> Network:
    return capture(fill(Plain(), SHAPE), SHAPE)


def chosen(network: Network, images: Tensor, bits: str = "W8A8", **changes: str) -> Choice:
    return choose(network, Samples(images), load_plan("deploy", **changes), parse_bits(bits))


BOTH = {"activation_ranges": CHOSEN, "bias_correction": CHOSEN}


def test_all_are_tried_in_the_order_of_their_care_and_the_first_that_is_as_good_as_the_best_is_taken(network: Network) -> None:
    found = chosen(network, noise(16, SHAPE, seed=0), **BOTH)
    tried = [(one.bias_correction, one.activation_ranges) for one in found.candidates]
    assert tried == [(correction, method) for correction in CORRECTIONS for method in RANGES]

    good = [one for one in found.candidates if one.behind <= one.error]
    assert (found.plan.activation_ranges, found.plan.bias_correction) == (good[0].activation_ranges, good[0].bias_correction)
    assert min(one.behind for one in found.candidates) == 0
    assert min(one.distance for one in found.candidates) == next(one.distance for one in found.candidates if one.behind == 0)
    assert found.plan.activation_ranges in found.sentence()


def test_ranges_that_ruin_the_outputs_are_not_taken(network: Network) -> None:
    """One pixel in a hundred carries all that the network answers: what cuts it off moves the outputs most."""
    images = 0.01 * noise(32, SHAPE, seed=0)
    images[:, :, 2, 2] = 30 * noise(32, SHAPE, seed=1)[:, :, 0, 0]
    found = chosen(network, images, activation_ranges=CHOSEN, bias_correction="none")
    apart = {one.activation_ranges: one.distance for one in found.candidates}
    assert apart["ema"] > 2 * apart["minmax"]  # what the choice is about
    assert found.plan.activation_ranges == "minmax"


def test_bias_correction_is_taken_where_it_helps_and_left_where_it_harms() -> None:
    """Coarse weights move each channel's mean by what the image's mean is: a correction holds for images alike, for no others."""
    torch.manual_seed(1)
    network = capture(Plain().eval(), SHAPE)
    bright = noise(32, SHAPE, seed=0).abs() + 2
    alike = chosen(network, bright, "W3A8", activation_ranges="minmax", bias_correction=CHOSEN)
    assert alike.plan.bias_correction == "samples"

    other = bright.clone()
    other[1::2] *= -1  # the half that judges
    unlike = chosen(network, other, "W3A8", activation_ranges="minmax", bias_correction=CHOSEN)
    assert unlike.plan.bias_correction == "none"


def test_a_student_has_what_was_chosen(network: Network) -> None:
    samples = Samples(noise(12, SHAPE, seed=0))
    found = choose(network, samples, load_plan("deploy", **BOTH), parse_bits("W8A8"))
    whole, direct = (quantize(network, samples, plan=plan) for plan in (load_plan("deploy", **BOTH), found.plan))
    assert whole.plan == direct.plan == found.plan
    assert torch.equal(whole(samples.images), direct(samples.images))


def test_where_nothing_is_to_be_chosen_the_plan_stays(network: Network) -> None:
    plan = load_plan("deploy")
    assert choose(network, Samples(noise(4, SHAPE, seed=0)), plan, parse_bits("W8A8")) == Choice(plan)
    assert Choice(plan).sentence() == ""


def test_one_sample_both_calibrates_and_judges(network: Network) -> None:
    found = chosen(network, noise(1, SHAPE, seed=0), **BOTH)
    assert CHOSEN not in (found.plan.activation_ranges, found.plan.bias_correction)


def test_a_network_of_fixed_batch_is_run_in_whole_ones(network: Network) -> None:
    fixed = replace(network, batch=4)
    images = noise(6, SHAPE, seed=0)
    assert chosen(fixed, images, **BOTH).plan == chosen(network, torch.cat([images, images[:2]]), **BOTH).plan


def test_answers_that_are_no_numbers_are_an_error(network: Network) -> None:
    with torch.no_grad():
        for stored in network.graph.state_dict().values():
            stored.fill_(torch.nan)
    with pytest.raises(ModelError, match="nan"):
        chosen(network, noise(4, SHAPE, seed=0), **BOTH)


def test_options_of_ranges_that_are_to_be_chosen_are_an_error() -> None:
    settings = ["quantization.activation_options.percent=99"]
    with pytest.raises(OptionError, match="name ranges too"):
        resolve(load_recipe("auto"), has_batchnorm=True, photographs=True, settings=settings)
