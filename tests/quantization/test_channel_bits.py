"""Bits go to the channels that need them, and the mean is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.exporters.export import export
from dreamquant.network.graph import Network, tensor_of
from dreamquant.quantization.channel_bits import channel_bits
from dreamquant.quantization.grid import grid_of_range
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.walk import float_tensor
from dreamquant.samples import Samples


def rows(channels: int, *, seed: int = 0) -> Tensor:
    """Channels of spreads from 1/8 to 8."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2 ** torch.linspace(-3, 3, channels)[torch.randperm(channels, generator=generator)]
    return torch.randn((channels, 400), generator=generator) * spread[:, None]


def error(x: Tensor, bits: Tensor) -> float:
    """The sum of squared errors under min-max grids of so many bits; a channel of none is 0."""
    total = 0.0
    for row, width in zip(x, bits.tolist(), strict=True):
        fake = grid_of_range(row.min(), row.max(), bits=width, symmetric=False).fake(row) if width else torch.zeros(())
        total += float((fake - row).square().sum())
    return total


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_mean_is_kept(channels: int, bits: int) -> None:
    given = channel_bits(rows(channels), bits)

    assert given.dtype == torch.int64
    assert given.shape == (channels,)
    assert given.sum().item() == channels * bits
    assert 0 <= given.min().item() <= given.max().item() <= 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_are_the_rounded_logarithms_of_the_papers_shares(bits: int) -> None:
    x = rows(32)
    alpha = x.double().square().mean(1).sqrt()
    exact = (alpha ** (2 / 3) / (alpha ** (2 / 3)).sum() * 32 * 2**bits).log2()
    shift = bits - exact.mean()  # the paper holds the levels' sum; whole bits are held to a mean
    given = channel_bits(x, bits)

    assert bool(((given - exact - shift).abs() < 1).all())
    assert given.float().std() > 0.8


def test_a_wider_channel_has_no_fewer_bits() -> None:
    x = rows(40)
    order = x.square().mean(1).argsort()
    given = channel_bits(x, 4)[order]

    assert bool((given.diff() >= 0).all())
    assert given[-1] >= given[0] + 3  # 6 binary orders of spread, two thirds of them in bits


def test_channels_alike_have_bits_alike() -> None:
    x = rows(1).expand(12, -1) * torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    assert channel_bits(x, 3).tolist() == [3] * 12


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_less_than_with_the_same_bits_for_all(bits: int) -> None:
    x = rows(24)
    assert error(x, channel_bits(x, bits)) < 0.5 * error(x, torch.full((24,), bits))


def test_a_channel_of_zeros_leaves_its_bits_to_the_others() -> None:
    x = rows(4)
    x[1] = 0.0
    given = channel_bits(x, 5)
    assert given[1] == 0
    assert given.sum() == 20

    assert channel_bits(x, 8).tolist() == [8, 0, 8, 8]  # more than 8 no channel can have
    assert channel_bits(torch.zeros(3, 5), 4).tolist() == [0, 0, 0]


def test_the_most_is_8_and_the_least_0() -> None:
    x = torch.ones(8, 10) * 10.0 ** torch.arange(8)[:, None]
    given = channel_bits(x, 4)

    assert given.max() == 8
    assert given.min() == 0
    assert given.sum() == 32


@pytest.mark.parametrize("bits", [-1, 9])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(OptionError, match=f"{bits} bits a channel; there can be 0 to 8"):
        channel_bits(rows(2), bits)


@pytest.fixture
def calibration(images: Callable[..., Tensor]) -> Samples:
    return Samples(images(16, (3, 11, 9)))


def test_each_channel_of_a_student_has_no_more_levels_than_its_bits(
    residual: Network, calibration: Samples, tmp_path: Path
) -> None:
    student = quantize(residual, calibration, bits="W3A8", plan="zeroq", channel_bits=True)
    graph, seen = student.network.graph, []
    for tensor in student.tensors():
        if tensor.kind == "weight":
            weight = tensor_of(graph, tensor.node)
            widths = channel_bits(float_tensor(graph, tensor.node).flatten(1), 3)
            assert int(widths.sum()) == 3 * len(widths)
            for row, width in zip(tensor.grid.fake(weight).flatten(1), widths.tolist(), strict=True):
                assert len(row.unique()) <= 2**width
            seen += widths.tolist()
    assert len(set(seen)) > 2
    assert export(student, tmp_path / "out.onnx", calibration).verification.top1_agreement > 90


def test_bits_by_channel_leave_less_error_than_as_many_for_all(residual: Network, calibration: Samples) -> None:
    def error(**changes: object) -> float:
        student = quantize(residual, calibration, bits="W4A8", plan="deploy", weight_symmetric=False, **changes)
        graph, total = student.network.graph, 0.0
        for tensor in student.tensors():
            if tensor.kind == "weight":
                weight = tensor_of(graph, tensor.node)
                exact = float_tensor(graph, tensor.node)
                total += (tensor.grid.fake(weight) - exact).square().sum().item()
        return total

    assert error(channel_bits=True) < error()


def test_symmetric_weights_cannot_have_bits_by_channel(residual: Network, calibration: Samples) -> None:
    with pytest.raises(OptionError, match="set weight_symmetric=false"):
        quantize(residual, calibration, plan="deploy", channel_bits=True)
