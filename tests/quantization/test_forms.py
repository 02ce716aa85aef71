"""What a plan asks of grids: where zero stands, which integers there are, which scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from dreamquant.exporters.export import export
from dreamquant.exporters.qdq import to_onnx
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.forms import Form, power_above
from dreamquant.quantization.plan import Plan, load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import few_channels
from dreamquant.samples import Samples

LOW, HIGH = torch.tensor([-1.0]), torch.tensor([3.0])
VALUES = torch.linspace(-1, 3, 1001).view(1, -1)


def ends(form: Form, low: Tensor = LOW, high: Tensor = HIGH) -> tuple[float, float]:
    grid = form.grid(low, high)
    return grid.fake(torch.tensor([-1e9])).item(), grid.fake(torch.tensor([1e9])).item()


@pytest.mark.parametrize("signed", [True, False])
def test_signed_integers_have_the_levels_of_unsigned_ones(signed: bool) -> None:
    grid = Form(8, "free", signed).grid(LOW, HIGH)

    assert (grid.qmin, grid.qmax) == ((-128, 127) if signed else (0, 255))
    assert torch.equal(grid.fake(VALUES), Form(8, "free", not signed).grid(LOW, HIGH).fake(VALUES))


@pytest.mark.parametrize(
    ("form", "low", "zero"),
    [
        (Form(8, "none", True), -1.0, 0),
        (Form(8, "middle", False), -1.0, 128),
        (Form(8, "middle", False), 0.0, 128),
        (Form(8, "ends", False), -1.0, 128),
        (Form(8, "ends", False), 0.0, 0),
        (Form(8, "ends", True), 0.0, -128),
        (Form(16, "none", True), -1.0, 0),
    ],
)
def test_zero_stands_where_it_has_to(form: Form, low: float, zero: int) -> None:
    grid = form.grid(torch.tensor([low]), HIGH)

    assert grid.zero_point.item() == zero
    assert (grid.qmin < 0) == form.signed
    assert grid.bits == form.bits
    assert grid.fake(HIGH).item() == pytest.approx(3.0, rel=1e-2)


def test_narrow_weights_leave_out_the_least_integer() -> None:
    grid = Form(8, "none", True, narrow=True).grid(torch.tensor([-3.0]), torch.tensor([1.0]))

    assert (grid.qmin, grid.qmax, grid.bits) == (-127, 127, 8)
    assert grid.integers(torch.tensor([-3.0])).item() == -127


def test_powers_of_two_are_those_of_less_error() -> None:
    assert torch.equal(power_above(torch.tensor([0.25, 0.26, 1.0, 3.0])), torch.tensor([0.25, 0.5, 1.0, 4.0]))
    form = Form(8, "none", True, power_of_two=True)
    whole = form.grid(torch.tensor([-1.01]), torch.tensor([1.01]))
    outliers = torch.cat([torch.linspace(-0.9, 0.9, 1000), torch.tensor([1.01])]).view(1, -1)
    cut = form.grid(torch.tensor([-1.01]), torch.tensor([1.01]), outliers)

    assert whole.scale.item() == 2**-6
    assert cut.scale.item() == 2**-7
    error = [(grid.fake(outliers) - outliers).square().sum() for grid in (cut, whole)]
    assert error[0] < error[1]
    asymmetric = Form(8, "free", False, power_of_two=True).grid(LOW, HIGH, VALUES)
    assert asymmetric.scale.item() == 2**-6
    assert asymmetric.zero_point.item() == 64


def test_ranges_are_no_smaller_than_the_least() -> None:
    assert ends(Form(8, "free", False, minimum_range=0.5), torch.tensor([0.0]), torch.tensor([1e-6])) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize(
    ("weight", "groups", "first", "small"),
    [
        ((16, 16, 3, 3), 1, False, False),
        ((16, 3, 3, 3), 1, True, False),
        ((12, 3, 3, 3), 1, True, True),
        ((32, 8, 3, 3), 1, False, False),
        ((8, 8, 3, 3), 1, False, True),
        ((32, 8, 3, 1), 1, False, True),
        ((8, 1, 3, 3), 8, False, False),
        ((12, 1, 3, 3), 12, False, True),
        ((8, 1, 1, 1), 8, False, True),
    ],
)
def test_convolutions_of_few_channels(weight: tuple[int, ...], groups: int, first: bool, small: bool) -> None:
    assert few_channels(weight, groups, 16, transposed=False, first=first) == small


@pytest.mark.parametrize("bits", ["W8A16", "W16A16", "W4A16", "W16A8"])
def test_sixteen_bits_are_stored_and_proven(residual: Network, calibration: Samples, tmp_path: Path, bits: str) -> None:
    student = quantize(residual, calibration, bits=bits, bias_correction="none", activation_ranges="minmax")

    artifact = export(student, tmp_path / "file.onnx", calibration)

    proto = onnx.load(tmp_path / "file.onnx")
    types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in proto.graph.initializer}
    assert ("UINT16" in types) == bits.endswith("A16")
    assert ("INT16" in types) == bits.startswith("W16")
    assert artifact.verification.written.same
    if bits == "W16A16":
        exact, found = residual.answers(calibration.images)[0], student.answers(calibration.images)[0]
        assert (found - exact).norm() < 1e-3 * exact.norm()


def test_grids_on_inputs_are_for_those_that_compute_with_them(residual: Network, calibration: Samples) -> None:
    proto = to_onnx(quantize(residual, calibration, placement="inputs", bias="float", activation_zero_point="none")).proto
    made = {node.output[0]: node for node in proto.graph.node}
    readers = {
        node.op_type
        for node in proto.graph.node
        if any(name in made and made[name].op_type == "DequantizeLinear" for name in node.input)
    }
    assert readers <= {"Conv", "Gemm", "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Squeeze", "QuantizeLinear"}
    kinds = [
        made[node.input[0]].op_type for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in made
    ]
    assert "Conv" not in kinds


class Joined(nn.Module):
    """Boxes and probabilities, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.boxes(x), torch.sigmoid(self.scores(x))], 1)


def test_a_fixed_grid_stands_before_a_shared_one(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    network, samples = capture(fill(Joined(), (3, 5, 4)), (3, 5, 4)), Samples(images(6, (3, 5, 4)))
    student = quantize(network, samples, plan="tflite")
    behind = [found for found in student.tensors() if found.node.op == "call_module"]
    (shared,) = behind
    fixed = next(found for found in student.tensors() if found.quantizer is shared.node)

    assert fixed.grid.scale.item() == 1 / 256  # type: ignore[union-attr]
    assert fixed.grid.zero_point.item() == -128  # type: ignore[union-attr]
    assert shared.grid.scale.item() != 1 / 256  # type: ignore[union-attr]
    joined = next(found for found in student.tensors() if found.node.name == "cat")
    assert joined.grid is shared.grid


def test_the_plan_of_the_runtime_at_hand_is_the_default_one(digits: Path, images: Callable[..., Tensor], tmp_path: Path) -> None:
    """Plan `deploy` asks for nothing that is new, and a file for `onnxruntime` is its file but for the name."""
    deploy, fields = load_plan("deploy"), Plan(name="deploy", summary="").model_dump()
    new = ("activation_sign", "activation_zero_point", "minimum_range", "scales", "ties", "fixed", "per_tensor", "weight_narrow")
    assert {name: getattr(deploy, name) for name in new} == {name: fields[name] for name in new}
    network = load(digits / "digits.pt2")
    samples = Samples(images(8, network.input_shape))
    for bits in ("W8A8", "W4A4"):
        protos = []
        for plan in ("deploy", "onnxruntime"):
            export(quantize(network, samples, bits=bits, plan=plan), tmp_path / "file.onnx", samples)
            protos.append(onnx.load(tmp_path / "file.onnx"))
            del protos[-1].metadata_props[:]
        assert protos[0].SerializeToString(deterministic=True) == protos[1].SerializeToString(deterministic=True)
