"""Grids hold zero, have the levels that their bits allow, and round as ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dreamquant.quantization.grid import FakeQuantize, Grid, grid_of_range, integer_limits

BITS = range(2, 9)
RANGES = [(-1.0, 2.0), (-0.7, 0.3), (0.4, 3.1), (-5.0, -2.0), (0.0, 0.0), (-1e-20, 1e-20), (-1e20, 3.0)]


def grid(low: float, high: float, *, bits: int, symmetric: bool) -> Grid:
    return grid_of_range(torch.tensor([low]), torch.tensor([high]), bits=bits, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ends", RANGES)
def test_zero_is_a_level(ends: tuple[float, float], bits: int, symmetric: bool) -> None:
    made = grid(*ends, bits=bits, symmetric=symmetric)

    assert made.fake(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert made.bits == bits
    assert bool(made.scale > 0)
    assert bool(made.scale.isfinite())
    assert made.qmin <= made.zero_point.item() <= made.qmax
    assert made.zero_point.item() == round(made.zero_point.item())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_taken_and_no_other(bits: int, symmetric: bool) -> None:
    made = grid(-1.3, 2.1, bits=bits, symmetric=symmetric)
    values = made.fake(torch.linspace(-9, 9, 5000))

    assert values.unique().numel() == 2**bits


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (-2.0, 1.0), (-0.7, 0.7), (0.0, 3.0), (-3.0, 0.0)])
def test_nothing_within_the_range_is_cut_off(ends: tuple[float, float], bits: int, symmetric: bool) -> None:
    made = grid(*ends, bits=bits, symmetric=symmetric)
    x = torch.linspace(*ends, 1001)
    half = 0.5 if symmetric else 1.0  # the zero point is rounded, which may move both ends by half a step

    assert (made.fake(x) - x).abs().max() <= (half + 1e-4) * made.scale


def test_symmetric_grids_are_signed_and_centred_and_as_fine_as_can_be() -> None:
    made = grid(-8.0, 3.0, bits=4, symmetric=True)

    assert (made.qmin, made.qmax) == (-8, 7)
    assert made.zero_point.item() == 0
    assert made.scale.item() == 1.0  # -8 is a level; 8 need not be
    assert grid(-3.0, 7.0, bits=4, symmetric=True).scale.item() == 1.0


def test_asymmetric_grids_are_unsigned() -> None:
    made = grid(-1.0, 2.0, bits=2, symmetric=False)

    assert (made.qmin, made.qmax) == (0, 3)
    assert made.scale.item() == 1.0
    assert made.zero_point.item() == 1
    assert made.fake(torch.tensor([-4.0, -0.6, 0.4, 1.6, 9.0])).tolist() == [-1.0, -1.0, 0.0, 2.0, 2.0]


def test_limits_are_those_of_the_integer_types() -> None:
    assert integer_limits(8, signed=True) == (np.iinfo(np.int8).min, np.iinfo(np.int8).max)
    assert integer_limits(8, signed=False) == (np.iinfo(np.uint8).min, np.iinfo(np.uint8).max)


def in_onnx_runtime(x: Tensor, made: Grid) -> Tensor:
    kind = np.int8 if made.qmin < 0 else np.uint8
    shape = () if made.axis is None else (-1,)
    attributes = {} if made.axis is None else {"axis": made.axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
        ],
        "grid",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [
            numpy_helper.from_array(made.scale.numpy().reshape(shape), "scale"),
            numpy_helper.from_array(made.zero_point.numpy().astype(kind).reshape(shape), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_rounding_is_that_of_onnx_runtime(axis: int | None, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    channels = 1 if axis is None else 5
    low, high = -torch.rand(channels, generator=generator), torch.rand(channels, generator=generator)
    made = grid_of_range(low, high, bits=8, symmetric=symmetric, axis=axis)
    x = torch.randn(5, 5, 401, generator=generator)

    assert torch.equal(made.fake(x), in_onnx_runtime(x, made))


@pytest.mark.parametrize("symmetric", [False, True])
def test_ties_go_to_even_as_in_onnx_runtime(symmetric: bool) -> None:
    made = grid(-64.0, 63.5 if symmetric else 191.0, bits=8, symmetric=symmetric)
    ties = (torch.arange(-600, 600) / 2 * made.scale).view(1, -1)

    assert torch.equal(made.fake(ties), in_onnx_runtime(ties, made))
    assert made.integers(torch.tensor([0.5, 1.5, 2.5]) * made.scale).sub(made.zero_point).tolist() == [0.0, 2.0, 2.0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_passes_inside_the_range_and_stops_outside(symmetric: bool) -> None:
    made = grid(-1.0, 1.0, bits=4, symmetric=symmetric)
    x = torch.tensor([-3.0, -0.8, -0.31, 0.0, 0.77, 3.0], requires_grad=True)
    y = made.fake(x)
    y.sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(y.detach(), made.fake(x.detach()))


def test_channels_have_scales_of_their_own() -> None:
    made = grid_of_range(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 30.0]), bits=4, symmetric=False, axis=1)
    x = torch.tensor([[0.9, 29.0], [-1.0, 2.0]])

    for channel in range(2):
        alone = Grid(made.scale[channel], made.zero_point[channel], 0, 15)
        assert torch.equal(made.fake(x)[:, channel], alone.fake(x[:, channel]))


def test_a_quantizer_without_a_grid_lets_everything_pass() -> None:
    x = torch.tensor([0.1234, -7.0])
    quantizer = FakeQuantize()

    assert quantizer(x) is x
    quantizer.grid = grid(-7.0, 7.0, bits=2, symmetric=True)
    assert not torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x), quantizer(quantizer(x)))
