"""Ranges and bias correction are those that the outputs bear best, and the careful ones where nothing tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dreamquant.allocation._sensitivity import with_layers
from dreamquant.errors import ModelError, OptionError
from dreamquant.network.answers import distances
from dreamquant.network.capture import capture, noise
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.outputs import restated
from dreamquant.network.scores import float_answers
from dreamquant.quantization.choice import BY_TENSOR, RANGES, WHOLE, Choice, choose
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.plan import CHOSEN, load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.quantization.student import Student
from dreamquant.recipe import load_recipe, resolve
from dreamquant.samples import REAL, Samples

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


def test_the_most_careful_ranges_that_are_as_good_as_the_best_are_taken(network: Network) -> None:
    found = chosen(network, noise(16, SHAPE, seed=0), **BOTH)
    assert found.taken is not None
    ranges = [one for one in found.candidates if one.bias_correction == "none"]
    assert [one.ranges for one in ranges] == list(WHOLE)
    assert min(one.behind for one in ranges) == 0
    assert min(one.distance for one in ranges) == next(one.distance for one in ranges if one.behind == 0)
    good = next(one for one in ranges if one.behind <= one.error)

    (corrected,) = (one for one in found.candidates if one.bias_correction == "samples")
    assert corrected.ranges == found.taken.ranges == good.ranges
    assert found.taken == (corrected if corrected.distance < good.distance / 2 else good)
    assert found.plan.bias_correction == found.taken.bias_correction
    assert found.taken.ranges in found.sentence()


def test_of_real_images_the_best_ranges_are_taken_and_corrections_that_help(network: Network) -> None:
    for seed in range(4):
        images, plan = noise(16, SHAPE, seed=seed), load_plan("deploy", activation_ranges=CHOSEN, bias_correction=CHOSEN)
        made, real = (choose(network, Samples(images, method=one), plan, parse_bits("W8A4")) for one in ("noise", REAL))
        assert made.taken is not None
        assert real.taken is not None
        assert real.taken.distance <= made.taken.distance
        assert real.taken.behind == min(0, real.taken.behind)  # the best, or better than that by correction
        assert real.taken.distance == min(one.distance for one in real.candidates if one.bias_correction == "none") or (
            real.taken.bias_correction == "samples" and real.taken.behind + real.taken.error < 0
        )


def test_ranges_that_ruin_the_outputs_are_not_taken(network: Network) -> None:
    """One pixel in a hundred carries all that the network answers: what cuts it off moves the outputs most."""
    images = 0.01 * noise(32, SHAPE, seed=0)
    images[:, :, 2, 2] = 30 * noise(32, SHAPE, seed=1)[:, :, 0, 0]
    found = chosen(network, images, activation_ranges=CHOSEN, bias_correction="none")
    apart = {method: moved(network, images, method) for method in RANGES}
    assert apart["ema"] > 2 * apart["minmax"]  # what the choice is about
    assert found.taken is not None
    assert found.taken.distance < 1.1 * min(apart.values())


def test_each_tensor_has_ranges_of_its_own(network: Network) -> None:
    """A tensor of which the layer behind hardly hears the largest values takes narrower ones, the others keep theirs."""
    images = noise(32, SHAPE, seed=0)
    graph = network.graph
    with torch.no_grad():
        first, middle = (tensor_of(graph, layer.all_input_nodes[1]) for layer in weighted_nodes(graph.graph)[:2])
        first[0] *= 100
        middle[:, 0] *= 0
    found = chosen(network, images, activation_ranges=CHOSEN, bias_correction="none")
    assert found.taken is not None
    assert found.taken.ranges == BY_TENSOR
    assert len(set(found.plan.tensor_ranges.values())) > 1
    apart = {one.ranges: one.distance for one in found.candidates}
    assert apart[BY_TENSOR] < apart["minmax"]

    student = quantize(network, Samples(images), plan=found.plan)
    for tensor in student.tensors():
        name = str(tensor.quantizer.target)
        if tensor.kind == "activation":
            alone = quantize(network, Samples(images), activation_ranges=found.plan.tensor_ranges.get(name, "minmax"))
            assert grids(alone)[name] == grids(student)[name]


def moved(network: Network, images: Tensor, method: str) -> float:
    """How far ranges found on one half of the images move the answers to the other."""
    student = quantize(network, Samples(images[::2]), activation_ranges=method, bias_correction="none")
    pairs = float_answers(network, images[1::2]), float_answers(student.network, images[1::2])
    return distances(network.outputs, *pairs)


def grids(student: Student) -> dict[str, float]:
    """The scale of every activation's grid."""
    kept = [tensor for tensor in student.tensors() if tensor.kind == "activation" and isinstance(tensor.grid, Grid)]
    return {str(tensor.quantizer.target): tensor.grid.scale.item() for tensor in kept}


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


class Loud(nn.Module):
    """A chain of layers behind a tensor that no grid of eight bits fits: one channel is 10,000 times the others' size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.rest = nn.Sequential(*(layer for _ in range(18) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU())))
        self.last = nn.Linear(8, 5)

    def shout(self) -> Loud:
        with torch.no_grad():
            self.first.weight[0] *= 1e4
            self.rest[0].weight[:, 0] *= 1e-4
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.rest(torch.nn.functional.silu(self.first(x))).mean((2, 3)))
        return y


def test_a_tensor_that_costs_the_outputs_most_by_far_stays_in_float(
    fill: Callable[..., Loud], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamquant.quantization.choice.MATTERS", 1e-5)
    monkeypatch.setattr("dreamquant.quantization.choice.SPARED", 8)
    network = capture(fill(Loud(), SHAPE).shout(), SHAPE)
    images = noise(16, SHAPE, seed=0)
    found = chosen(network, images, spare=CHOSEN, **BOTH)
    assert found.taken is not None
    assert found.plan.float_tensors
    assert found.spared is not None
    assert found.spared <= found.taken.distance / 2
    assert found.plan.float_tensors[0] in found.sentence()

    student = quantize(network, Samples(images), plan=found.plan)
    assert not {str(tensor.quantizer.target) for tensor in student.tensors()} & set(found.plan.float_tensors)


@pytest.mark.parametrize(("share", "tried"), [(1e-7, True), (1.0, False)])
def test_what_matters_is_measured_by_what_is_no_ground(
    fill: Callable[..., Loud], monkeypatch: pytest.MonkeyPatch, share: float, tried: bool
) -> None:
    monkeypatch.setattr("dreamquant.quantization.choice.MATTERS", 1e2)
    monkeypatch.setattr("dreamquant.quantization.choice.SPARED", 8)
    monkeypatch.setattr("dreamquant.quantization.choice.busy", lambda *_: share)
    found = chosen(capture(fill(Loud(), SHAPE).shout(), SHAPE), noise(16, SHAPE, seed=0), spare=CHOSEN, **BOTH)
    assert bool(found.plan.float_tensors) is tried


def test_where_answers_hardly_move_no_tensor_stays_in_float(network: Network) -> None:
    found = chosen(network, noise(16, SHAPE, seed=0), spare=CHOSEN, **BOTH)
    assert found.spared is None
    assert found.plan.float_tensors == []


def test_a_tensor_that_is_not_quantized_cannot_be_left_in_float(network: Network) -> None:
    for field in ({"float_tensors": ["nowhere_grid"]}, {"tensor_ranges": {"nowhere_grid": "mse"}}):
        with pytest.raises(OptionError, match="nowhere_grid"):
            quantize(network, Samples(noise(2, SHAPE, seed=0)), **field)


class Labels(nn.Module):
    """Two labels, told from the mean of an image; `bias` is the logit of an image of nothing."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.relu(self.first(x)).mean((2, 3))) + self.bias)


@pytest.mark.parametrize("bias", [-9.0, 9.0])
def test_samples_that_show_nothing_judge_no_bias_correction(bias: float) -> None:
    torch.manual_seed(0)
    network = capture(Labels(bias).eval(), SHAPE)
    network = replace(network, outputs=restated(network, {network.outputs[0].name: "multilabel"}))
    found = chosen(network, noise(16, SHAPE, seed=0), **BOTH)
    assert found.shown is (bias > 0)
    assert {one.bias_correction for one in found.candidates} == ({"none", "samples"} if found.shown else {"none"})
    assert ("show nothing" in found.sentence()) is not found.shown
    assert all(one.distance > 0 for one in found.candidates)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_samples_that_show_nothing_spare_tensors_by_first_order_alone(
    fill: Callable[..., Loud], monkeypatch: pytest.MonkeyPatch, bias: float
) -> None:
    monkeypatch.setattr("dreamquant.quantization.choice.MATTERS", 1e9)
    module = fill(Loud(), SHAPE).shout()
    with torch.no_grad():
        module.last.bias += bias
    network = capture(module, SHAPE)
    network = replace(network, outputs=restated(network, {network.outputs[0].name: "multilabel"}))
    found = chosen(network, noise(16, SHAPE, seed=0), spare=CHOSEN, **BOTH)
    assert found.shown is (bias > 0)
    assert bool(found.plan.float_tensors) is not found.shown
    if not found.shown:
        assert found.taken is not None
        assert found.spared is not None
        assert found.spared <= found.taken.distance / 2
        assert f"by first order, with {found.plan.float_tensors[0]}" in found.sentence()


def test_where_no_gradient_passes_whole_methods_are_compared(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object) -> None:
        raise ModelError("no gradient")

    monkeypatch.setattr("dreamquant.quantization.choice.effects", none)
    monkeypatch.setattr("dreamquant.quantization.choice.MATTERS", 0)
    found = chosen(network, noise(8, SHAPE, seed=0), spare=CHOSEN, **BOTH)
    assert [one.ranges for one in found.candidates if one.bias_correction == "none"] == list(RANGES)
    assert found.plan.tensor_ranges == {}
    assert found.plan.float_tensors == []


def test_a_layer_that_is_left_in_float_takes_its_tensors_along(network: Network) -> None:
    images = Samples(noise(4, SHAPE, seed=0))
    plan = load_plan("deploy", tensor_ranges={"x_grid": "mse", "relu_grid": "mse"})
    kept = with_layers(plan, {name: {"keep_float": True} for name in ("conv2d", "conv2d_1")})
    names = {str(tensor.quantizer.target) for tensor in quantize(network, images, plan=kept).tensors()}
    assert not names & set(plan.tensor_ranges)
