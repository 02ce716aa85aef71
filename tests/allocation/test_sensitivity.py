"""What a quantizer does alone, against running the whole network again with that one change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.allocation import _sensitivity, sensitivities
from dreamquant.allocation._sensitivity import damages, layer_grids, lone_student, sharing
from dreamquant.errors import DataError, ModelError
from dreamquant.network import interpreter, live
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.interpreter import compute, interpret
from dreamquant.network.outputs import restated
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.quantization.student import transformed
from dreamquant.samples import Samples

PLANS = ["deploy", "zeroq", "brecq"]


def kl(expected: Tensor, actual: Tensor) -> float:
    """Mean divergence of softmaxes (N, classes), counted another way."""
    one, other = expected.double().softmax(1), actual.double().softmax(1)
    return (one * (one / other).log()).sum(1).mean().item()


def with_one_weight_quantized(network: Network, samples: Samples, plan: str, bits: str, layer: str) -> Tensor:
    """The scores of the whole float network, one weight of it on the grid that `quantize` gives it."""
    student = quantize(network, samples, bits=bits, plan=plan)
    grids = {tensor.node.name: tensor.grid for tensor in student.tensors() if tensor.kind == "weight"}
    changed = transformed(network, load_plan(plan), parse_bits(bits))
    node = next(node for node in weighted_nodes(changed.graph.graph) if node.name == layer).args[1]
    weight = tensor_of(changed.graph, node)
    setattr(changed.graph, str(node.target), grids[node.name].fake(weight))
    return changed(samples.images)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_alone_are_the_whole_network_with_one_weight_changed(residual: Network, calibration: Samples, plan: str) -> None:
    found = sensitivities(residual, calibration, plan, "W3A8")
    expected = residual(calibration.images)

    assert [one.layer for one in found] == [node.name for node in weighted_nodes(residual.graph.graph)]
    assert len(found) == 9
    for one in found:
        changed = with_one_weight_quantized(residual, calibration, plan, "W3A8", one.layer)
        assert one.weights == pytest.approx(kl(expected, changed), rel=1e-3)
        assert one.weights > 1e-7


def rounded(x: Tensor) -> Tensor:
    """x on the grid of three bits over its range."""
    return grid_of_range(x.min(), x.max(), bits=3, symmetric=False).fake(x)


@pytest.fixture(scope="module")
def chain(fill: Callable[..., nn.Module]) -> nn.Module:
    """Two layers for images (2, 6, 5)."""
    shape = (2, 6, 5)
    return fill(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5)), shape)


def test_inputs_alone_are_the_whole_network_with_one_tensor_rounded(chain: nn.Module, images: Callable[..., Tensor]) -> None:
    x = images(30, (2, 6, 5))
    plan = load_plan("deploy", activation_ranges="minmax", image_bits=3, last_input_bits=3)
    first, second = sensitivities(capture(chain, (2, 6, 5)), Samples(x), plan, "W8A3")
    convolution, linear = chain[0], chain[4]  # type: ignore[index]
    with torch.no_grad():
        expected = chain(x)
        late = linear(F.max_pool2d(rounded(torch.relu(convolution(x))), 2).flatten(1))

        assert first.activations == pytest.approx(kl(expected, chain(rounded(x))), rel=1e-4)
        assert second.activations == pytest.approx(kl(expected, late), rel=1e-4)
        assert second.both == second.weights + second.activations


def test_an_input_that_the_plan_leaves_float_does_no_damage(chain: nn.Module, images: Callable[..., Tensor]) -> None:
    first, second = sensitivities(capture(chain, (2, 6, 5)), Samples(images(30, (2, 6, 5))), "zeroq", "W8A3")

    assert first.activations == 0.0
    assert second.activations > 0.0


def test_layers_of_one_input_share_its_damage(residual: Network, calibration: Samples) -> None:
    by_name = {one.layer: one for one in sensitivities(residual, calibration, "deploy", "W8A4")}

    assert by_name["conv2d_3"].activations == by_name["conv2d_4"].activations > 0  # left and right
    assert by_name["conv2d_2"].activations != by_name["conv2d_3"].activations


@pytest.mark.parametrize("plan", PLANS)
def test_fewer_bits_do_more_damage(residual: Network, calibration: Samples, plan: str) -> None:
    eight, four = (sensitivities(residual, calibration, plan, bits) for bits in ("W8A8", "W4A4"))
    for one, other in zip(eight, four, strict=True):
        assert one.weights <= other.weights
        assert one.activations <= other.activations


def test_the_size_of_a_chunk_changes_nothing(residual: Network, calibration: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sensitivities(residual, calibration, "deploy", "W4A4")
    seen: list[int] = []
    monkeypatch.setattr(
        _sensitivity, "interpret", lambda graph, images, **more: seen.append(len(images)) or interpret(graph, images, **more)
    )
    for memory, longest in ((1, 1), (40_000, 7)):
        monkeypatch.setattr(live, "WORKING", memory)
        seen.clear()
        pieces = sensitivities(residual, calibration, "deploy", "W4A4")
        assert 0 < max(seen) <= longest
        for one, other in zip(whole, pieces, strict=True):
            assert one.weights == pytest.approx(other.weights, rel=1e-3)
            assert one.activations == pytest.approx(other.activations, rel=1e-3)


def test_only_what_follows_a_change_is_computed_again(
    residual: Network, calibration: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layer_grids(lone_student(residual, calibration, load_plan("deploy"), "W4A4"))
    counts: list[int] = []
    monkeypatch.setattr(interpreter, "compute", lambda graph, node, values: counts.append(1) or compute(graph, node, values))

    def computed(layer: str) -> int:
        counts.clear()
        damages(residual, calibration, load_plan("deploy"), "W4A4", [layers[layer].weights])
        return len(counts)

    assert computed("linear") < computed("conv2d_5") < computed("conv2d")


def test_progress_is_told_to_the_end(residual: Network, calibration: Samples) -> None:
    heard: list[tuple[int, int]] = []
    sensitivities(residual, calibration, "zeroq", "W4A4", lambda done, steps: heard.append((done, steps)))

    assert [done for done, _ in heard] == list(range(1, len(heard) + 1))
    assert {steps for _, steps in heard} == {len(heard)}


def test_layers_left_float_are_left_out(residual: Network, calibration: Samples) -> None:
    plan = load_plan("zeroq", layers={"conv2d_1": {"keep_float": True}})
    found = [one.layer for one in sensitivities(residual, calibration, plan, "W4A4")]

    assert len(found) == 8
    assert "conv2d_1" not in found


class Tied(nn.Module):
    """A convolution used twice, and boxes instead of classes: (N, anchors, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.stem(x))))))
        scores: Tensor = self.head(x).flatten(2).transpose(1, 2)
        return scores


@pytest.fixture(scope="module")
def tied(fill: Callable[..., nn.Module]) -> Network:
    return capture(fill(Tied(), (3, 5, 4)), (3, 5, 4))


def test_boxes_are_values_and_a_weight_used_twice_is_one(tied: Network, images: Callable[..., Tensor]) -> None:
    samples = Samples(images(6, (3, 5, 4)))
    found = {one.layer: one for one in sensitivities(tied, samples, "zeroq", "W3A8")}
    boxes = tied(samples.images)
    assert boxes.shape == (6, 20, 4)

    assert found["conv2d_1"].weights == found["conv2d_2"].weights
    changed = with_one_weight_quantized(tied, samples, "zeroq", "W3A8", "conv2d_1")
    both = ((changed - boxes).square().mean() / (boxes - boxes.mean(0)).square().mean() / 2).item()
    assert found["conv2d_1"].weights == pytest.approx(both, rel=1e-3)
    assert both > 1e-5


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_network_of_one_batch_size(images: Callable[..., Tensor], count: int) -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.conv(20 * x.reshape(6, -1).softmax(0).reshape(2, 3, 5, 4)).amax((2, 3))
            scores: Tensor = self.last(hidden)
            return scores

    torch.manual_seed(0)
    network = capture(torch.export.export(Bound().eval(), (torch.zeros(2, 3, 5, 4),)))
    network = replace(network, outputs=restated(network, {"output": "classes"}))
    assert network.batch == 2
    samples = Samples(images(count, (3, 5, 4)))
    for one in sensitivities(network, samples, "zeroq", "W2A8"):
        changed = with_one_weight_quantized(network, samples, "zeroq", "W2A8", one.layer)
        assert one.weights == pytest.approx(kl(network(samples.images), changed), rel=1e-3)


def test_samples_and_scores_that_cannot_be_used_are_refused(residual: Network, images: Callable[..., Tensor]) -> None:
    with pytest.raises(DataError, match=r"the network takes \(N, 3, 11, 9\)"):
        sensitivities(residual, Samples(torch.zeros(2, 3, 4, 4)))

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.layer(x).mean((2, 3)).sub(1e9).log()
            return scores

    with pytest.raises(ModelError, match="not finite"):
        sensitivities(capture(Broken(), (3, 4, 4)), Samples(images(4, (3, 4, 4))))


def test_a_network_without_any_layer_has_no_sensitivities(images: Callable[..., Tensor]) -> None:
    network = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), (3, 4, 4))

    assert sensitivities(network, Samples(images(4, (3, 4, 4)))) == []


def test_grids_are_those_of_quantize(residual: Network, calibration: Samples) -> None:
    lone = layer_grids(lone_student(residual, calibration, load_plan("brecq"), "W4A4"))
    student = quantize(residual, calibration, bits="W4A4", plan="brecq", observe="float")
    grids = {str(tensor.quantizer.target): tensor.grid for tensor in student.tensors()}
    for layer in lone.values():
        for name, grid in {**layer.weights, **layer.inputs}.items():
            assert isinstance(grid, Grid)
            assert torch.equal(grid.scale, grids[name].scale)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ({"a": ("x",), "b": ("y",)}, [["a"], ["b"]]),
        ({"a": ("x",), "b": ("y",), "c": ("x",)}, [["a", "c"], ["b"]]),
        ({"a": ("x",), "b": ("y",), "c": ("y", "x")}, [["a", "b", "c"]]),
        ({}, []),
    ],
)
def test_layers_that_share_are_grouped(names: dict[str, tuple[str, ...]], groups: list[list[str]]) -> None:
    assert sharing(names) == groups
