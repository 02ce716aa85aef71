"""A student is near its network, nearer with more bits, and its integers fit the runtimes that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.errors import DataError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.notes import notes, shape_of
from dreamquant.quantization.plan import load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import Chunks, walk
from dreamquant.samples import Samples

PLANS = ["deploy", "zeroq", "brecq"]


def distance(student: Student, network: Network, images: Tensor) -> float:
    """Error of the scores, relative to their spread."""
    expected = network(images)
    return ((student(images) - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("plan", PLANS)
def test_eight_bits_are_near_the_float_network_and_fewer_are_farther(
    residual: Network, calibration: Samples, images: Callable[..., Tensor], plan: str
) -> None:
    fresh = images(50, residual.input_shape, seed=77)
    eight, six, four = (
        distance(quantize(residual, calibration, bits=bits, plan=plan), residual, fresh) for bits in ("W8A8", "W6A6", "W4A4")
    )
    assert eight < 0.15
    assert eight < six < four


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_each_part_has_its_own_bits(residual: Network, calibration: Samples, part: str) -> None:
    few = {"weights": "W4A8", "activations": "W8A4"}[part]
    eight, less = (distance(quantize(residual, calibration, bits=b), residual, calibration.images) for b in ("W8A8", few))

    assert eight < less


@pytest.mark.parametrize("plan", PLANS)
def test_the_network_given_is_not_changed(residual: Network, calibration: Samples, plan: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in residual.graph.named_buffers()}
    code, state = residual.graph.code, torch.random.get_rng_state()
    metas = {node.name: notes(node) for node in residual.graph.graph.nodes}
    images = calibration.images.clone()
    quantize(residual, calibration, bits="W4A4", plan=plan, bias_correction="samples")

    assert residual.graph.code == code
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in residual.graph.named_buffers())
    assert {node.name: notes(node) for node in residual.graph.graph.nodes} == metas
    assert torch.equal(images, calibration.images)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_samples_give_the_same_student(residual: Network, calibration: Samples) -> None:
    one, other = (quantize(residual, calibration, bits="W4A4") for _ in range(2))

    assert torch.equal(one(calibration.images), other(calibration.images))


@pytest.mark.parametrize("plan", PLANS)
def test_every_quantized_tensor_is_on_its_grid(residual: Network, calibration: Samples, plan: str) -> None:
    student = quantize(residual, calibration, bits="W3A4", plan=plan)
    kinds = [tensor.kind for tensor in student.tensors()]

    assert kinds.count("weight") == 9
    assert kinds.count("bias") == (9 if plan == "deploy" else 0)
    assert kinds.count("activation") > 5
    for tensor in student.tensors():
        assert bool((tensor.grid.scale > 0).all())
        assert bool(tensor.grid.scale.isfinite().all())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weight_granularity(residual: Network, calibration: Samples, granularity: str) -> None:
    student = quantize(residual, calibration, bits="W4A8", weight_granularity=granularity)
    for tensor in student.tensors():
        if tensor.kind == "weight":
            channels = shape_of(tensor.node)[0]
            assert tensor.grid.scale.numel() == (channels if granularity == "channel" else 1)


def test_ranges_are_those_of_the_float_network_or_of_the_quantized_prefix(residual: Network, calibration: Samples) -> None:
    scales = {
        observe: [
            t.grid.scale
            for t in quantize(residual, calibration, bits="W2A2", observe=observe).tensors()
            if t.kind == "activation"
        ]
        for observe in ("float", "quantized")
    }
    assert torch.equal(scales["float"][0], scales["quantized"][0])  # nothing comes before the image
    assert any(not torch.equal(a, b) for a, b in zip(scales["float"], scales["quantized"], strict=True))


def test_minmax_grids_reach_to_the_ends_of_the_samples(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W8A6", plan="zeroq")
    seen = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        seen[node.name] = torch.cat(quantized)

    walk(student.network, calibration.images, after=after)
    for tensor in student.tensors():
        if tensor.kind == "activation":
            grid, values = tensor.grid, seen[tensor.node.name]
            assert abs((grid.qmax - grid.zero_point) * grid.scale - values.max().clamp(min=0)) <= grid.scale
            assert abs((grid.qmin - grid.zero_point) * grid.scale - values.min().clamp(max=0)) <= grid.scale


# --- biases -----------------------------------------------------------------------------------------------------------


def channel_errors(student: Student, images: Tensor) -> dict[str, Tensor]:
    """By layer, each output channel's mean error, relative to the channel's spread."""
    found = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        if str(node.target).startswith(("aten.conv", "aten.linear")):
            one, other = torch.cat(quantized), torch.cat(exact)
            axes = [axis for axis in range(one.dim()) if axis != 1]
            found[node.name] = (one - other).mean(axes).abs() / other.std()

    walk(student.network, images, after=after)
    return found


@pytest.mark.parametrize("plan", ["deploy", "brecq"])
def test_bias_correction_takes_most_of_each_channels_mean_error_off(residual: Network, calibration: Samples, plan: str) -> None:
    plain, corrected = (
        channel_errors(quantize(residual, calibration, bits="W4A8", plan=plan, bias_correction=on), calibration.images)
        for on in ("none", "samples")
    )
    assert len(corrected) == 9
    left, before = (sum(error.abs().sum().item() for error in errors.values()) for errors in (corrected, plain))
    assert left < 0.5 * before


def test_integer_biases_stand_on_input_scale_times_weight_scale(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W4A5")
    grids = {tensor.quantizer: tensor.grid for tensor in student.tensors()}
    biases = [tensor for tensor in student.tensors() if tensor.kind == "bias"]

    assert len(biases) == 9
    for tensor in biases:
        layer = next(iter(tensor.quantizer.users))
        expected = grids[layer.args[0]].scale * grids[layer.args[1]].scale  # type: ignore[index]
        torch.testing.assert_close(tensor.grid.scale, expected, rtol=1e-6, atol=0)


def test_biases_of_dead_channels_fit_an_int32(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = fill(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)), (3, 6, 5))
    with torch.no_grad():
        module[0].weight[1] = 0  # type: ignore[index, operator]
        module[0].weight[2] *= 1e-13  # type: ignore[index, operator]
        module[0].bias.copy_(torch.tensor([0.1, 3.0, -50.0, 0.0, 1e4]))  # type: ignore[union-attr, operator]
        module[2].bias[0] = -7e3  # type: ignore[index, operator]
    network = capture(module, (3, 6, 5))
    samples = Samples(images(16, (3, 6, 5)))
    student = quantize(network, samples, bits="W8A8")
    for tensor in student.tensors():
        if tensor.kind == "bias":
            stored = tensor_of(student.network.graph, tensor.node).double()
            assert (stored / tensor.grid.scale.double()).abs().max() <= 2**30 + 1
            assert (tensor.grid.fake(stored) - stored).abs().max() <= tensor.grid.scale.max()
    assert distance(student, network, samples.images) < 0.05


def test_a_layer_with_a_float_input_keeps_a_float_bias(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, quantize_image=False)
    layers = [next(iter(tensor.quantizer.users)).name for tensor in student.tensors() if tensor.kind == "bias"]

    assert len(layers) == 8
    assert "conv2d" not in layers


# --- 16-bit sums ------------------------------------------------------------------------------------------------------


def layouts(weight: Tensor) -> Iterator[Tensor]:
    """The orders in which a runtime may line up a filter's weights: (channels out, rows, weights in a row)."""
    count = len(weight)
    yield weight.reshape(count, 1, -1)
    if weight.dim() == 4:
        last = weight.permute(0, 2, 3, 1)
        yield last.reshape(count, 1, -1)
        yield last.reshape(count, -1, last.shape[-1])


def worst_pair(integers: Tensor) -> int:
    """The largest |sum| of two neighbours (0, 1), (2, 3), ... of one sign, in any of the layouts."""
    worst = 0.0
    for rows in layouts(integers):
        if rows.shape[-1] % 2:
            rows = torch.cat([rows, torch.zeros(*rows.shape[:-1], 1)], -1)
        first, second = rows[..., ::2], rows[..., 1::2]
        same = (first * second >= 0) * (first + second).abs()
        worst = max(worst, same.max().item(), integers.abs().max().item())
    return int(worst)


class Layers(nn.Module):
    """Convolutions of odd sizes, grouped, depthwise and on one channel, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.grouped = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 9, (1, 3), groups=3)
        self.depthwise, self.even, self.linear = nn.Conv2d(9, 9, 2, groups=9), nn.Conv2d(9, 5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(torch.relu(self.depthwise(self.grouped(torch.relu(self.odd(x))))))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def layers() -> nn.Module:
    return Layers().eval()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_no_pair_of_neighbouring_weights_overflows(
    layers: nn.Module, images: Callable[..., Tensor], seed: int, granularity: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 7, 9)
    for parameter in layers.parameters():
        heavy = torch.randn(parameter.shape, generator=generator) ** 3
        parameter.data.copy_(heavy.abs() if seed == 3 else heavy)
    network = capture(layers, shape)
    samples = Samples(images(8, shape))
    free, plain = (quantize(network, samples, saturation_free=on, weight_granularity=granularity) for on in (True, False))

    def pairs(student: Student) -> dict[str, int]:
        return {
            tensor.node.name: worst_pair(tensor.grid.integers(tensor_of(student.network.graph, tensor.node)))
            for tensor in student.tensors()
            if tensor.kind == "weight" and "depthwise" not in tensor.node.name
        }

    assert len(pairs(free)) == 4
    assert max(pairs(free).values()) <= 128
    assert max(pairs(free).values()) >= 120  # no more is given away than is needed
    assert max(pairs(plain).values()) > 128


def test_depthwise_weights_are_as_fine_as_they_can_be(layers: nn.Module, images: Callable[..., Tensor]) -> None:
    student = quantize(capture(layers, (1, 7, 9)), Samples(images(4, (1, 7, 9))), saturation_free=True)
    tensor = next(t for t in student.tensors() if t.kind == "weight" and "depthwise" in t.node.name)
    integers = tensor.grid.integers(tensor_of(student.network.graph, tensor.node)).flatten(1)

    assert bool((integers.abs().amax(1) >= 127).all())


def test_few_bits_need_no_room(residual: Network, calibration: Samples) -> None:
    scales = [
        [t.grid.scale for t in quantize(residual, calibration, bits="W4A8", saturation_free=on).tensors() if t.kind == "weight"]
        for on in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(scales[0][1:-1], scales[1][1:-1], strict=True))


# --- what fits and what does not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 11, 8), (4, 1, 11, 9), (0, 3, 11, 9), (4, 3 * 11 * 9), (3, 11, 9)])
def test_samples_that_do_not_fit_are_refused(residual: Network, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"the network takes \(N, 3, 11, 9\)") as caught:
        quantize(residual, Samples(torch.zeros(shape)))
    assert str(tuple(shape)) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": "W12A8"}, "12 bits for weights"),
        ({"plan": "depoly"}, "did you mean 'deploy'"),
        ({"weight_ranges": "mze"}, "unknown ranges method 'mze'; did you mean 'mse'"),
        ({"activation_ranges": "percentile", "activation_options": {"percnt": 99}}, "did you mean 'percent'"),
        ({"banana": 1}, "unknown option 'banana'"),
    ],
)
def test_impossible_options_are_refused(
    residual: Network, calibration: Samples, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        quantize(residual, calibration, **changes)  # type: ignore[arg-type]


def test_changes_hold_for_a_plan_that_was_made_before(residual: Network, calibration: Samples) -> None:
    plan = load_plan("zeroq")
    student = quantize(residual, calibration, bits="W4A4", plan=plan, first_weight_bits=8)

    assert student.plan == load_plan("zeroq", first_weight_bits=8)
    with pytest.raises(OptionError, match="unknown option 'banana'"):
        quantize(residual, calibration, plan=plan, banana=1)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_network_of_one_batch_size_is_quantized(count: int, images: Callable[..., Tensor]) -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(20 * x.reshape(6, -1).softmax(0).reshape(2, 3, 5, 4)).amax((2, 3))
            return y

    network = capture(torch.export.export(Bound().eval(), (torch.zeros(2, 3, 5, 4),)))
    assert network.batch == 2
    samples = Samples(images(count, (3, 5, 4)))
    student = quantize(network, samples, activation_ranges="minmax")

    assert student(samples.images).shape == (count, 4)
    if count == 8:
        assert distance(student, network, samples.images) < 0.05


def test_a_network_without_any_layer_has_nothing_to_quantize(images: Callable[..., Tensor]) -> None:
    network = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), (3, 4, 4))
    student = quantize(network, Samples(images(4, (3, 4, 4))))
    x = images(3, (3, 4, 4), seed=5)

    assert torch.equal(student(x), network(x))
    assert student.tensors() == []
