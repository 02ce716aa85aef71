"""Equalization keeps the function, gives both sides of every channel one range, and one grid a weight then costs less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.exporters.export import export
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, aten, tensor_of
from dreamquant.network.load import load
from dreamquant.network.notes import is_tensor, notes
from dreamquant.network.operators import CLIPPING, argument
from dreamquant.network.pairs import input_rows, output_rows, pairs
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.samples import Samples
from dreamquant.transform.equalize import HOMOGENEOUS, RANGES, equalize
from dreamquant.transform.fold_batchnorm import fold_batchnorm

SHAPE = (3, 8, 6)
Build = Callable[[nn.Module], nn.Module]


def unevenly(module: nn.Module, seed: int = 3) -> nn.Module:
    """Channels that differ up to a thousandfold in range: each layer's rows, and its bias, times a random factor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                scale = 10 ** (3 * torch.rand(len(part.weight), generator=generator) - 1.5)
                part.weight.mul_(scale.view(-1, *[1] * (part.weight.dim() - 1)))
                if part.bias is not None:
                    part.bias.mul_(scale)
    return module


@pytest.fixture
def network(fill: Callable[..., nn.Module]) -> Callable[..., Network]:
    """`network(module)`: captured, with random weights of uneven channels."""
    return lambda module: capture(unevenly(fill(module, SHAPE)), SHAPE)


def through(function: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), function, nn.Conv2d(6, 5, 3, padding=1))


PRELU = nn.PReLU(6)
PRELU.weight.data.copy_(torch.linspace(-0.2, 0.5, 6))
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many pairs there are
    "nothing": (lambda: through(nn.Identity()), 1),
    "relu": (lambda: through(nn.ReLU()), 1),
    "leaky relu": (lambda: through(nn.LeakyReLU(0.1)), 1),
    "prelu": (lambda: through(PRELU), 1),
    "relu6": (lambda: through(nn.ReLU6()), 1),
    "another clip": (lambda: through(nn.Hardtanh(0.0, 0.7)), 1),
    "relu and pooling": (lambda: through(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1))), 1),
    "zeros around": (lambda: through(nn.ZeroPad2d(1)), 1),
    "depthwise chain": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        ),
        2,
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)), 1),
    "into a transposed one": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, 2)), 1),
    "out of a transposed one": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 4, 3)), 1),
    "one position": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        1,
    ),
    "many positions": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), 1),
    "linear layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 4)), 1),
    "linear layers at each place": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), 1),
    "none, through sigmoid": (lambda: through(nn.Sigmoid()), 0),
    "none, two functions": (lambda: through(nn.Sequential(nn.ReLU(), nn.LeakyReLU())), 0),
    "none, a clip off zero": (lambda: through(nn.Hardtanh(-1.0, 1.0)), 0),
    "none, another axis": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Linear(6, 6)), 0),
}


def both_sides(before: Network, after: Network) -> list[tuple[Tensor, Tensor]]:
    """The ranges that `after` has on the two sides of each pair of `before`."""
    return [
        (
            RANGES["symmetric"](output_rows(pair.first, tensor_of(after.graph, argument(pair.first, 1)))),
            RANGES["symmetric"](input_rows(pair.second, tensor_of(after.graph, argument(pair.second, 1)), pair.positions)),
        )
        for pair in pairs(before.graph.graph, HOMOGENEOUS | CLIPPING)
    ]


def weights(network: Network) -> list[Tensor]:
    return [tensor_of(network.graph, argument(layer, 1)) for layer in weighted_nodes(network.graph.graph)]


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4 * other.abs().max())


@pytest.mark.parametrize("name", list(CASES))
def test_the_function_is_kept_and_both_sides_of_a_channel_have_one_range(
    name: str, network: Callable[..., Network], images: Callable[..., Tensor]
) -> None:
    build, count = CASES[name]
    before = fold_batchnorm(network(build()))
    code, stored_before = before.graph.code, [weight.clone() for weight in weights(before)]
    after = equalize(before, bits=8, sweeps=100, tolerance=1e-6)
    x = 3 * images(6, SHAPE, seed=8)

    assert close(after(x), before(x))
    changed = [not torch.equal(one, other) for one, other in zip(weights(before), weights(after), strict=True)]
    assert changed == ([True] * (count + 1) if count else [False, False])
    ranges = both_sides(before, after) if count else []
    assert len(ranges) == count
    for one, other in ranges:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    assert before.graph.code == code
    assert all(torch.equal(one, other) for one, other in zip(weights(before), stored_before, strict=True))


def relative_error(weight: Tensor) -> float:
    """Of rounding to one 8-bit grid, relative to each channel's own size."""
    grid = grid_of_range(weight.min(), weight.max(), bits=8, symmetric=True)
    rows, rounded = weight.flatten(1), grid.fake(weight).flatten(1)
    return ((rounded - rows).norm(dim=1) / rows.norm(dim=1)).mean().item()


def test_one_grid_a_weight_costs_less(network: Callable[..., Network], images: Callable[..., Tensor]) -> None:
    before = fold_batchnorm(network(CASES["depthwise chain"][0]()))
    after = equalize(before, bits=8)
    one, other = (sum(map(relative_error, weights(net)[:2])) for net in (before, after))
    assert other < 0.2 * one

    x = images(32, SHAPE, seed=5)
    form = {"transforms": [], "weight_granularity": "tensor", "bias_correction": "none", "saturation_free": False}
    errors = [(quantize(net, Samples(x), bits="W6A8", **form)(x) - net(x)).std() for net in (before, after)]  # type: ignore[arg-type]
    assert errors[1] < 0.5 * errors[0]


def test_clips_become_one_of_each_channel_or_vanish_or_stay(
    network: Callable[..., Network], images: Callable[..., Tensor]
) -> None:
    before = network(through(nn.ReLU6()))
    exact, relu, skipped = (equalize(before, bits=8, clip=clip) for clip in ("exact", "relu", "skip"))
    small, large = 1e-3 * images(4, SHAPE), 100 * images(4, SHAPE)
    kinds = [[node.target for node in net.graph.graph.nodes if node.op == "call_function"] for net in (exact, relu, skipped)]

    assert kinds[0] == [aten.conv2d.default, aten.hardtanh.default, aten.minimum.default, aten.conv2d.default]
    assert kinds[1] == [aten.conv2d.default, aten.relu.default, aten.conv2d.default]
    assert skipped.graph.code == before.graph.code
    assert close(relu(small), before(small))
    assert not close(relu(large), before(large))
    assert close(exact(large), before(large))
    assert all(is_tensor(node) for node in exact.graph.graph.nodes if node.op != "output")


@pytest.mark.parametrize("ranges", list(RANGES))
def test_channels_of_no_range_stay(network: Callable[..., Network], images: Callable[..., Tensor], ranges: str) -> None:
    before = network(through(nn.ReLU()))
    first, second = weights(before)
    first[1] = 0
    first[2] = 1e-42
    first[4] = 1e-9
    second[:, 3] = 0
    after = equalize(before, bits=8, ranges=ranges)
    x = images(4, SHAPE)

    assert all(bool(tensor.isfinite().all()) for tensor in after.graph.buffers())
    assert all(torch.equal(weights(after)[0][channel], first[channel]) for channel in (1, 2, 3, 4))
    assert not torch.equal(weights(after)[0][5], first[5])
    assert torch.equal(weights(after)[1][:, 3], second[:, 3])
    assert close(after(x), before(x))


def test_ranges_may_reach_from_end_to_end(network: Callable[..., Network]) -> None:
    after = equalize(network(through(nn.ReLU())), bits=8, ranges="asymmetric")
    first, second = weights(after)
    torch.testing.assert_close(RANGES["asymmetric"](first.flatten(1)), RANGES["asymmetric"](second.transpose(0, 1).flatten(1)))


def test_statistics_are_scaled_with_their_channels(network: Callable[..., Network], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    before = fold_batchnorm(network(module))
    after = equalize(before, bits=8)
    (layer, *_), (same, *_) = (weighted_nodes(net.graph.graph) for net in (after, before))
    scale = weights(after)[0].flatten(1).norm(dim=1) / weights(before)[0].flatten(1).norm(dim=1)

    assert float((scale - 1).abs().min()) > 1e-3
    for new, old in zip(notes(layer).normal, notes(same).normal, strict=True):
        torch.testing.assert_close(new, old * scale)


class Twice(nn.Module):
    """A convolution that reads its own output, and one whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.fork, self.one, self.other = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fork(torch.relu(self.same(torch.relu(self.same(x)))))
        result: Tensor = self.one(torch.relu(x)) + self.other(x)
        return result


def test_what_others_read_too_stays(network: Callable[..., Network]) -> None:
    before = network(Twice())
    after = equalize(before, bits=8)

    assert len(weights(before)) == 5
    assert after.graph.code == before.graph.code
    assert after.graph is not before.graph
    assert all(torch.equal(one, other) for one, other in zip(weights(after), weights(before), strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranges": "symetric"}, "did you mean 'symmetric'"),
        ({"clip": "cut"}, "known: exact, relu, skip"),
        ({"sweeps": 0}, "sweeps=0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ],
)
def test_impossible_options(residual: Network, options: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        equalize(residual, bits=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", ["exact", "relu", "skip"])
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_the_file_computes_the_same(
    residual: Network, residual_onnx: Path, calibration: Samples, tmp_path: Path, source: str, clip: str
) -> None:
    network = residual if source == "torch" else load(residual_onnx)
    options = {"transforms": ["fold_batchnorm", "equalize"], "transform_options": {"equalize": {"clip": clip}}}
    student = quantize(network, calibration, **options)  # type: ignore[arg-type]
    artifact = export(student, tmp_path / "student.onnx", calibration)

    assert (student.network.source.proto is None) == (source == "torch" or clip != "skip")
    assert artifact.size > 0
    spread = network(calibration.images).std()
    assert (student(calibration.images) - network(calibration.images)).std() < 0.15 * spread
