"""The file that is written does in ONNX Runtime what the student does, from torch and from ONNX, under every plan."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.exporters.export import export
from dreamquant.exporters.qdq import to_onnx
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.notes import notes, set_notes
from dreamquant.network.onnx_import import load_onnx
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples

PLANS = ["deploy", "zeroq", "brecq"]
BITS = ["W8A8", "W4A4", "W6A5", "W2A3"]


@pytest.fixture(scope="module", params=["torch", "onnx"])
def network(request: pytest.FixtureRequest, residual: Network, residual_onnx: Path) -> Network:
    return residual if request.param == "torch" else load_onnx(residual_onnx)


def largest_difference(student: Student, images: Tensor, *, optimize: bool) -> float:
    proto = to_onnx(student).proto
    onnx.checker.check_model(proto, full_check=True)
    actual = torch.from_numpy(onnx_runner(proto.SerializeToString(), optimize=optimize)(images.numpy()))
    return (student(images) - actual).abs().max().item()


@pytest.mark.parametrize("plan", PLANS)
def test_the_file_computes_what_the_student_does(
    network: Network, calibration: Samples, images: Callable[..., Tensor], plan: str
) -> None:
    fresh = images(30, network.input_shape, seed=3)
    for bits in BITS:
        student = quantize(network, calibration, bits=bits, plan=plan)
        spread = student(fresh).std().item()
        # in 8 bits the runtime computes in integers, and may round a value between two levels the other way
        near = (0.05 if bits == "W8A8" else 1e-4) * spread

        assert largest_difference(student, fresh, optimize=False) < 1e-4 * spread, bits
        assert largest_difference(student, fresh, optimize=True) < near, bits


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_granularity": "tensor"},
        {"weight_symmetric": False, "bias": "float"},
        {"quantize_image": False},
        {"merge_activations": True},
        {"bias_correction": "none"},
        {"transforms": []},
        {"weight_ranges": "mse", "activation_ranges": "percentile"},
    ],
    ids=lambda changes: ",".join(changes),
)
@pytest.mark.parametrize("bits", ["W8A8", "W3A4"])
def test_changes_of_a_plan_reach_the_file(network: Network, calibration: Samples, changes: dict[str, object], bits: str) -> None:
    student = quantize(network, calibration, bits=bits, **changes)  # type: ignore[arg-type]
    spread = student(calibration.images).std().item()

    assert largest_difference(student, calibration.images, optimize=False) < 1e-4 * spread
    assert largest_difference(student, calibration.images, optimize=True) < (0.05 if bits == "W8A8" else 1e-4) * spread


@pytest.mark.parametrize("bits", ["W8A8", "W5A4"])  # with 4-bit weights, opset 21, ONNX Runtime cannot load the file
def test_symmetric_activations_reach_the_file(network: Network, calibration: Samples, bits: str) -> None:
    student = quantize(network, calibration, bits=bits, activation_zero_point="none")
    spread = student(calibration.images).std().item()

    assert largest_difference(student, calibration.images, optimize=False) < 1e-4 * spread
    assert largest_difference(student, calibration.images, optimize=True) < 0.05 * spread


# --- how things are stored --------------------------------------------------------------------------------------------


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def quantized_weights(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    stored = initializers(proto)
    inputs = [
        stored[node.input[0]] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    return [tensor for tensor in inputs if tensor.data_type != TensorProto.INT32]


@pytest.mark.parametrize(
    ("symmetric", "four", "eight"), [(True, "INT4", "INT8"), (False, "UINT4", "UINT8")], ids=["symmetric", "asymmetric"]
)
def test_four_bits_are_stored_two_to_a_byte(
    network: Network, calibration: Samples, symmetric: bool, four: str, eight: str
) -> None:
    student = quantize(network, calibration, bits="W4A8", weight_symmetric=symmetric, bias="float")
    proto = to_onnx(student).proto
    kinds = Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in quantized_weights(proto))

    assert kinds == {four: 7, eight: 2}
    for tensor in quantized_weights(proto):
        if tensor.data_type == getattr(TensorProto, four):
            assert len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) // 2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_a_tensor_may_be_on_two_grids(
    digits: Path, images: Callable[..., Tensor], source: str, bits: str, tmp_path: Path
) -> None:
    network = load(digits / "digits.pt2") if source == "torch" else load_onnx(digits / "digits_bnfolded.onnx")
    calibration, fresh = (Samples(images(30, network.input_shape, seed=seed)) for seed in (2, 3))
    student = quantize(network, calibration, bits=bits, elementwise_bits=8)
    grids = Counter(tensor.node.name for tensor in student.tensors() if tensor.kind == "activation")
    assert (max(grids.values()) == 2) == (bits != "W8A8")

    spread = network(fresh.images).std().item()
    proof = export(student, tmp_path / "out.onnx", fresh).verification
    assert proof.steps.apart == {}
    assert proof.steps.largest_difference < 1e-4 * spread
    errors = [
        (one(fresh.images) - network(fresh.images)).pow(2).mean() for one in (student, quantize(network, calibration, bits=bits))
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("between", [False, True], ids=["anywhere", "between two levels"])
def test_what_is_stored_is_the_students_integers(network: Network, calibration: Samples, between: bool) -> None:
    """Also of weights that single precision sees half way between two levels, and double precision a little off."""
    student = quantize(network, calibration, bits="W4A8")
    for tensor in student.tensors() if between else ():
        if tensor.kind == "weight":
            weight = student.network.graph.get_buffer(str(tensor.node.target))
            scale, _ = tensor.grid.shaped(weight.dim())
            weight.copy_((torch.floor(weight / scale) + 0.5) * scale)
            set_notes(tensor.node, replace(notes(tensor.node), changed=True))
    stored = [numpy_helper.to_array(tensor).astype(np.int32) for tensor in quantized_weights(to_onnx(student).proto)]
    graph = student.network.graph
    expected = [
        tensor.grid.integers(graph.get_buffer(str(tensor.node.target))).numpy().astype(np.int32)
        for tensor in student.tensors()
        if tensor.kind == "weight"
    ]
    assert len(stored) == len(expected)
    for one in expected:
        assert any(one.shape == other.shape and np.array_equal(one, other) for other in stored)


def test_activations_are_in_eight_bits_whatever_they_have(network: Network, calibration: Samples) -> None:
    """ONNX Runtime refuses a Clip before QuantizeLinear to 4 bits."""
    proto = to_onnx(quantize(network, calibration, bits="W4A4")).proto
    stored = initializers(proto)
    zeros = [stored[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]

    assert zeros
    assert {zero.data_type for zero in zeros} == {TensorProto.UINT8}


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_narrow_activations_take_no_more_levels_than_they_have(
    network: Network, calibration: Samples, images: Callable[..., Tensor], bits: int
) -> None:
    proto = to_onnx(quantize(network, calibration, bits=f"W8A{bits}", plan="zeroq")).proto
    integers = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    for name in integers:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(integers, {session.get_inputs()[0].name: 5 * images(9, network.input_shape).numpy()})

    assert len(found) == 8
    assert max(int(values.max()) for values in found) == 2**bits - 1


class Clipped(nn.Module):
    """Layers of 8-bit weights; the third reads few bits, and what its clip leaves has eight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:3]:
            x = F.hardtanh(layer(x), 0.0, 6.0)
        y: Tensor = self.layers[3](x)
        return y


def test_a_float_bias_is_not_rounded_to_the_grid_of_few_bits(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], tmp_path: Path
) -> None:
    network = capture(fill(Clipped(), (3, 8, 8)), (3, 8, 8))
    samples = Samples(images(16, (3, 8, 8)))
    student = quantize(network, samples, bits="W8A2", plan="brecq", second_input_bits=None)
    assert {tensor.grid.bits for tensor in student.tensors() if tensor.kind == "activation"} == {2, 8}
    proven = export(student, tmp_path / "student.onnx", samples).verification
    assert proven.largest_difference < 1e-5


def test_few_bits_make_a_smaller_file(digits: Path) -> None:
    path = digits / "digits_bnfolded.onnx"
    network = load(path)
    samples = Samples(torch.randn(8, *network.input_shape, generator=torch.Generator().manual_seed(0)))
    eight, four = (to_onnx(quantize(network, samples, bits=bits)).proto.ByteSize() for bits in ("W8A8", "W4A8"))

    assert eight < 0.45 * path.stat().st_size
    assert four < 0.7 * eight


def test_no_float_weights_are_left_behind(network: Network, calibration: Samples) -> None:
    proto = to_onnx(quantize(network, calibration)).proto
    largest = max(
        (int(np.prod(tensor.dims)) for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT),
        default=0,
    )
    read = {name for node in proto.graph.node for name in node.input}

    assert largest <= 8  # scales, one a channel
    assert {tensor.name for tensor in proto.graph.initializer} <= read


def test_the_opset_is_no_newer_than_it_must_be(network: Network, calibration: Samples) -> None:
    def opset(bits: str) -> int:
        return to_onnx(quantize(network, calibration, bits=bits)).proto.opset_import[0].version

    assert opset("W8A8") == (17 if network.source.proto is None else 13)
    assert opset("W5A3") == opset("W8A8")
    assert opset("W4A8") == 21


# --- the same graph goes out ------------------------------------------------------------------------------------------


def test_names_and_metadata_of_an_incoming_file_survive(residual_onnx: Path, calibration: Samples, tmp_path: Path) -> None:
    proto = onnx.load(residual_onnx)
    helper.set_model_props(proto, {"licence": "none", "dreamquant.mean": "0.5,0.5,0.4", "dreamquant.std": "0.2,0.2,0.2"})
    proto.producer_name, proto.doc_string = "someone", "a network"
    proto.graph.name = "the graph"
    path = tmp_path / "given.onnx"
    onnx.save(proto, path)
    before = {node.name: node.op_type for node in proto.graph.node}
    network = load(path)
    for bits in ("W8A8", "W4A4"):
        made = to_onnx(quantize(network, calibration, bits=bits)).proto
        after = {node.name: node.op_type for node in made.graph.node}
        kept = {name: kind for name, kind in before.items() if kind not in ("BatchNormalization", "Constant", "Cast")}

        assert len(set(after)) == len(made.graph.node)  # every node has a name of its own
        assert {name: after.get(name) for name in kept} == kept
        assert "BatchNormalization" not in after.values()
        assert [value.name for value in made.graph.input] == ["pixels"]
        assert [value.name for value in made.graph.output] == ["scores"]
        assert made.graph.input[0] == proto.graph.input[0]
        assert {entry.key: entry.value for entry in made.metadata_props} == {
            entry.key: entry.value for entry in proto.metadata_props
        }
        assert (made.producer_name, made.doc_string, made.graph.name) == ("someone", "a network", "the graph")
    assert network.source.proto == proto  # and what came in is as it was


def test_an_output_may_be_quantized_and_keeps_its_name(images: Callable[..., Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.first(x))
            return y, self.second(y)

    network = capture(Net().eval(), (3, 5, 6))
    samples = Samples(images(8, (3, 5, 6)))
    student = quantize(network, samples)

    assert [output.name for output in to_onnx(student).proto.graph.output] == ["output_0", "output_1"]
    assert largest_difference(student, samples.images, optimize=False) < 1e-5


# --- networks of other kinds ------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used twice, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = 10 * torch.relu(self.conv(x))
        y: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return y


class Upscale(nn.Module):
    """Transposed convolutions: plain, and grouped behind a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False)
        self.norm, self.grouped = nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.grouped(F.hardswish(self.norm(self.up(F.gelu(self.down(x))))))
        return y


class Perceptron(nn.Module):
    """Linear layers with and without bias, on two and on three dimensions, and a BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Linear(7, 5, bias=False), nn.Linear(5, 6)
        self.flat, self.norm, self.head = nn.Linear(3 * 5 * 6, 9, bias=False), nn.BatchNorm1d(9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.silu(self.norm(self.flat(self.mix(torch.relu(self.tokens(x))).flatten(1)))))
        return y


class Attention(nn.Module):
    """A transformer's layer behind a patch embedding and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 3, stride=3)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm1(x)).reshape(x.shape[0], 7, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(0.5 * q @ k.transpose(-2, -1), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], 7, 12))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        y: Tensor = self.head(x[:, 0])
        return y


class Shuffled(nn.Module):
    """A split into two, one half left alone, and channels shuffled, as in ShuffleNet; prelu and padding by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(6, 4, 1)
        self.prelu = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.prelu(self.stem(x)).chunk(2, 1)
        right = torch.relu(self.conv(F.pad(right, (1, 1, 1, 1))))
        x = torch.cat([left, right], 1)
        x = x.reshape(x.shape[0], 2, 3, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape)
        y: Tensor = self.last(F.interpolate(x, scale_factor=2)).amax((2, 3))
        return y


ZOO = {
    Twice: (3, 7, 6),
    Upscale: (3, 9, 7),
    Perceptron: (3, 5, 7),
    Attention: (3, 9, 6),
    Shuffled: (3, 7, 9),
}


@pytest.fixture(scope="module", params=list(ZOO), ids=lambda kind: kind.__name__)
def zoo_module(request: pytest.FixtureRequest, fill: Callable[..., nn.Module]) -> tuple[nn.Module, tuple[int, int, int]]:
    shape = ZOO[request.param]
    return fill(request.param(), shape), shape


@pytest.fixture(scope="module", params=["torch", "onnx"])
def zoo(
    request: pytest.FixtureRequest, zoo_module: tuple[nn.Module, tuple[int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> Network:
    module, shape = zoo_module
    if request.param == "torch":
        return capture(module, shape)
    path = tmp_path_factory.mktemp("zoo") / "zoo.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, *shape),),
            path,
            opset_version=13,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
            do_constant_folding=True,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return load_onnx(path)


def test_other_networks_go_out_as_they_are_measured(zoo: Network, images: Callable[..., Tensor]) -> None:
    samples = Samples(images(16, zoo.input_shape))
    for plan, bits in itertools.product(PLANS, ("W8A8", "W4A4")):
        student = quantize(zoo, samples, bits=bits, plan=plan)
        spread = student(samples.images).std().item()
        near = (0.1 if bits == "W8A8" else 1e-3) * spread

        assert largest_difference(student, samples.images, optimize=False) < 1e-4 * spread, (plan, bits)
        if plan != "zeroq":  # between float activations and 4-bit weights ONNX Runtime multiplies in dynamic 8 bits
            assert largest_difference(student, samples.images, optimize=True) < near, (plan, bits)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_convolutions_really_run_in_integers(network: Network, calibration: Samples, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    proto = to_onnx(quantize(network, calibration, bits="W8A8", plan="deploy")).proto
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)

    assert kinds["QLinearConv"] == 7
    assert kinds["Conv"] == 0
    assert kinds["FusedConv"] == 1  # `right`: its ReLU shares the grid of negative values that it is joined to
    assert kinds["QLinearAdd"] == 1
    assert kinds["QLinearMul"] == 1
    assert kinds["QLinearConcat"] == 1
    assert kinds["QLinearLeakyRelu"] == 1
    assert kinds["QGemm"] == 1
    assert kinds["QuantizeLinear"] <= 3  # the image, behind `right`, and behind ReduceMean where the file has one
