"""Splitting keeps the function, halves the largest weights, and loses nothing by rounding the halves."""

from __future__ import annotations

import math
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
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import argument
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.samples import Samples
from dreamquant.transform.split_channels import split_channels, split_rows

SHAPE = (3, 8, 6)


def weights(network: Network) -> list[Tensor]:
    return [tensor_of(network.graph, argument(layer, 1)) for layer in weighted_nodes(network.graph.graph)]


def outlying(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                largest = part.weight.abs().max()
                part.weight.flatten()[5], part.weight.flatten()[-2] = 3 * largest, -2.5 * largest
    return module


CASES: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {  # and how many channels each layer gets, of ratio 0.2
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3, 2, 1)), [0, 2]),
    "grouped and depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 4, 1)),
        [0, 0, 0, 1],
    ),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 7, 1), nn.ConvTranspose2d(7, 4, 3, 2)), [0, 2]),
    "linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.Flatten(), nn.Linear(168, 9), nn.ReLU(), nn.Linear(9, 4)),
        [0, 34, 2],
    ),
    "linear at each place": (lambda: nn.Sequential(nn.Conv2d(3, 7, 1), nn.Linear(6, 9), nn.Linear(9, 4)), [0, 2, 2]),
    "the first alone": (lambda: nn.Sequential(nn.Conv2d(3, 7, 1), nn.ReLU()), [0]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_function_is_kept_and_the_largest_weights_fall(
    name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    build, more = CASES[name]
    before = capture(outlying(fill(build(), SHAPE)), SHAPE)
    code = before.graph.code
    after = split_channels(before, bits=8, ratio=0.2)
    x = images(5, SHAPE, seed=2)
    selects = [node for node in after.graph.graph.nodes if node.target is aten.index_select.default]

    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4 * float(before(x).abs().max()))
    assert len(selects) == sum(count > 0 for count in more)
    assert before.graph.code == code
    for one, other, count in zip(weights(before), weights(after), more, strict=True):
        assert other.numel() - one.numel() == count * one.numel() // max(one.shape[0 if "transposed" in name else 1], 1)
        assert (other.abs().max() < 0.9 * one.abs().max()) == (count > 0)
    for node in after.graph.graph.nodes:
        if node.op == "get_attr":
            assert shape_of(node) == tuple(tensor_of(after.graph, node).shape)
        elif node.op == "call_function":
            assert shape_of(node)[0] == 2


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("seed", range(3))
def test_rounded_halves_add_up_to_the_rounded_whole(bits: int, seed: int) -> None:
    rows = torch.randn(40, 90, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    split, sources = split_rows(rows, 12, bits)
    grid = grid_of_range(split.min(), split.max(), bits=bits, symmetric=True)
    step = float(grid.scale)
    whole = torch.zeros_like(rows).index_add(0, sources, split)
    rounded = torch.zeros_like(rows).index_add(0, sources, grid.integers(split.float()).double())
    ties = ((rows / step + 0.5) % 1 - 0.5).abs() > 0.4999  # which single precision may round either way
    saturated = torch.zeros_like(rows).index_add(0, sources, (split < step * (grid.qmin - 0.5)).double()) > 0

    assert len(set(sources.tolist())) == 40
    torch.testing.assert_close(whole, rows)
    assert not bool(saturated.any())
    assert torch.equal(rounded[~ties], torch.round(rows / step)[~ties])
    assert split.abs().max() < 0.7 * rows.abs().max()
    naive = torch.cat([rows / 2, rows / 2])
    assert not torch.equal(2 * torch.round(naive[:40] / step), torch.round(rows / step))


def test_the_largest_channel_is_split_each_time() -> None:
    rows = torch.tensor([[1.0, 0.1], [-16.0, 2.0], [0.5, 5.0]], dtype=torch.float64)
    split, sources = split_rows(rows, 3, 8)

    assert sources.tolist() == [0, 1, 2, 1, 1, 1]  # 16 -> 8 + 8 -> 4 + 4 + 8 -> 4 + 4 + 4 + 4, while 5 is whole
    assert split.abs().max() == pytest.approx(5, abs=0.03)


def test_weights_of_nothing_stay_nothing() -> None:
    split, _ = split_rows(torch.zeros(5, 4, dtype=torch.float64), 2, 8)
    assert torch.equal(split, torch.zeros(7, 4, dtype=torch.float64))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.same = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.same(torch.relu(self.same(self.first(x))))
        return result


def test_weights_of_several_layers_stay(fill: Callable[..., nn.Module]) -> None:
    before = capture(fill(Shared(), SHAPE), SHAPE)
    assert split_channels(before, bits=8).graph.code == before.graph.code


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5])
def test_impossible_ratios(residual: Network, ratio: float) -> None:
    with pytest.raises(OptionError, match=rf"split_channels.ratio is {ratio}"):
        split_channels(residual, bits=8, ratio=ratio)


def test_one_grid_a_weight_costs_less(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1))
    outlying(fill(module, SHAPE)[2:])  # type: ignore[index]
    network, samples = capture(module, SHAPE), Samples(images(32, SHAPE))
    form = {"weight_granularity": "tensor", "bias_correction": "none", "saturation_free": False, "last_weight_bits": None}
    plain, split = (
        quantize(network, samples, bits="W4A8", transforms=transforms, transform_options=options, **form)  # type: ignore[arg-type]
        for transforms, options in (([], {}), (["split_channels"], {"split_channels": {"ratio": 0.1}}))
    )
    errors = [(student(samples.images) - network(samples.images)).std() for student in (plain, split)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", ["W8A8", "W4A5"])
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_the_file_computes_the_same(
    residual: Network, residual_onnx: Path, calibration: Samples, tmp_path: Path, source: str, bits: str
) -> None:
    network = residual if source == "torch" else load(residual_onnx)
    student = quantize(
        network,
        calibration,
        bits=bits,
        transforms=["fold_batchnorm", "split_channels"],
        transform_options={"split_channels": {"ratio": 0.2}},
    )
    export(student, tmp_path / "student.onnx", calibration)
    selects = [node for node in student.network.graph.graph.nodes if node.target is aten.index_select.default]
    widths = {node.name: math.prod(shape_of(node)) for node in selects}

    assert len(widths) == 7  # of nine layers: neither the first nor the depthwise one
    assert student.network.source.proto is None


def test_layers_of_a_transformer_are_split(transformer: Network, images: Callable[..., Tensor], tmp_path: Path) -> None:
    samples = Samples(images(16, transformer.input_shape))
    student = quantize(transformer, samples, transforms=["split_channels"])
    export(student, tmp_path / "student.onnx", samples)
    torch.testing.assert_close(
        split_channels(transformer, bits=8)(samples.images), transformer(samples.images), rtol=1e-4, atol=1e-4
    )
