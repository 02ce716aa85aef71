"""Weights on a codebook go out as indices and a table, and ONNX Runtime looks up what the student computes with."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from dreamquant.errors import UnsupportedOperator
from dreamquant.exporters.export import export
from dreamquant.exporters.qdq import to_onnx
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.notes import notes, shape_of
from dreamquant.network.onnx_import import load_onnx
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.walk import quantizer_of
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples


class Kinds(nn.Module):
    """Layers whose weights are stored in different ways: a convolution used twice, transposed ones, plain and grouped, and
    linear layers on three dimensions, without a bias, and on two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 12, 3, stride=2, bias=False)
        self.grouped, self.mix = nn.ConvTranspose2d(12, 16, 2, groups=2), nn.Linear(26, 12, bias=False)
        self.head = nn.Linear(16 * 12, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down(x))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        x = self.mix(torch.relu(self.grouped(torch.relu(self.up(x)))))
        y: Tensor = self.head(torch.relu(x).mean(2).flatten(1))
        return y


SHAPE = (3, 9, 25)
WEIGHTS = 7 - 1  # one of the seven layers' is shared


@pytest.fixture(scope="module", params=["torch", "onnx"])
def kinds(request: pytest.FixtureRequest, fill: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Network:
    module = fill(Kinds(), SHAPE)
    if request.param == "torch":
        return capture(module, SHAPE)
    path = tmp_path_factory.mktemp("kinds") / "kinds.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, *SHAPE),),
            path,
            opset_version=13,
            dynamo=False,
            dynamic_axes={"x": {0: "n"}},
            input_names=["x"],
        )
    return load_onnx(path)


@pytest.fixture(scope="module", params=["torch", "onnx"])
def network(request: pytest.FixtureRequest, residual: Network, residual_onnx: Path) -> Network:
    return residual if request.param == "torch" else load_onnx(residual_onnx)


def student_of(network: Network, samples: Samples, levels: str = "quartiles", **changes: object) -> Student:
    return quantize(network, samples, **({"bits": "W4A8", "weight_levels": levels} | changes))  # type: ignore[arg-type]


def difference(student: Student, images: Tensor) -> float:
    """The mean in ONNX Runtime without its rewriting, relative to the outputs' spread.

    Sums in another order move single activations to the next level, and with them single outputs by a hundredth.
    """
    proto = to_onnx(student).proto
    onnx.checker.check_model(proto, full_check=True)
    actual = torch.from_numpy(onnx_runner(proto.SerializeToString(), optimize=False)(images.numpy()))
    return ((student(images) - actual).abs().mean() / student(images).std()).item()


def initializers(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def indices(proto: onnx.ModelProto) -> list[TensorProto]:
    """The stored tensors that a Cast reads and a table is looked up with."""
    stored = initializers(proto)
    looked_up = {node.input[1] for node in proto.graph.node if node.op_type in ("Gather", "GatherElements")}
    return [
        stored[node.input[0]]
        for node in proto.graph.node
        if node.op_type == "Cast" and node.output[0] in looked_up and node.input[0] in stored
    ]


@pytest.mark.parametrize("levels", ["kmeans", "quartiles"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
def test_the_file_computes_what_the_student_does(
    network: Network,
    calibration: Samples,
    images: Callable[..., Tensor],
    tmp_path: Path,
    plan: str,
    granularity: str,
    levels: str,
) -> None:
    student = student_of(network, calibration, levels, plan=plan, weight_granularity=granularity)
    fresh = images(30, network.input_shape, seed=3)
    artifact = export(student, tmp_path / "net.onnx", Samples(fresh))

    assert difference(student, fresh) < 1e-3
    assert artifact.verification.mean_difference < 1e-3 * student(fresh).std()


@pytest.mark.parametrize("bits", ["W2A8", "W4A8", "W5A6"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("plan", ["deploy", "zeroq", "brecq"])
def test_layers_of_all_kinds_are_looked_up(
    kinds: Network, images: Callable[..., Tensor], plan: str, granularity: str, bits: str
) -> None:
    samples = Samples(images(16, SHAPE))
    student = student_of(kinds, samples, bits=bits, plan=plan, weight_granularity=granularity)

    assert difference(student, samples.images) < 1e-3


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_shared_weight_is_stored_and_looked_up_once(kinds: Network, images: Callable[..., Tensor], granularity: str) -> None:
    student = student_of(kinds, Samples(images(16, SHAPE)), plan="zeroq", weight_granularity=granularity)
    proto = to_onnx(student).proto
    lookup = "Gather" if granularity == "tensor" else "GatherElements"
    looked_up = [node.input[1] for node in proto.graph.node if node.op_type == lookup]
    cast = {name for node in proto.graph.node if node.op_type == "Cast" for name in node.output}

    assert len([tensor for tensor in student.tensors() if tensor.kind == "weight"]) == WEIGHTS + 1
    assert len(cast.intersection(looked_up)) == WEIGHTS


# --- how things are stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_up_to_four_bits_are_stored_two_to_a_byte(
    kinds: Network, images: Callable[..., Tensor], bits: int, granularity: str
) -> None:
    student = student_of(kinds, Samples(images(16, SHAPE)), bits=f"W{bits}A8", plan="zeroq", weight_granularity=granularity)
    proto = to_onnx(student).proto
    found = indices(proto)

    assert len(found) == WEIGHTS
    for tensor in found:
        assert tensor.data_type == TensorProto.UINT4
        assert len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) // 2)
    assert proto.opset_import[0].version == 21


@pytest.mark.parametrize("bits", [5, 6])
def test_more_bits_are_stored_in_a_byte_each(kinds: Network, images: Callable[..., Tensor], bits: int) -> None:
    student = student_of(kinds, Samples(images(16, SHAPE)), bits=f"W{bits}A8", plan="zeroq", weight_granularity="tensor")
    proto = to_onnx(student).proto

    assert [tensor.data_type for tensor in indices(proto)] == [TensorProto.UINT8] * WEIGHTS
    assert proto.opset_import[0].version < 21


@pytest.mark.parametrize("bits", ["W4A8", "W8A8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_no_weight_takes_more_than_its_floats(kinds: Network, images: Callable[..., Tensor], granularity: str, bits: str) -> None:
    """A small weight of many levels would need a table larger than itself; its floats are stored, on their levels."""
    student = student_of(kinds, Samples(images(16, SHAPE)), bits=bits, weight_granularity=granularity)
    stored = initializers(to_onnx(student).proto)
    sizes = Counter[str]()
    for name, tensor in stored.items():
        for end in ("_q", "_levels"):
            if name.endswith(end):
                sizes[name.removesuffix(end)] += len(tensor.raw_data)
    weights = {tensor.node.name: shape_of(tensor.node) for tensor in student.tensors() if tensor.kind == "weight"}
    floats = [name for name in sizes if f"{name}_q" not in stored]

    assert len(sizes) == len(weights) == WEIGHTS
    whole = [4 * int(np.prod(shape)) for shape in weights.values()]
    assert all(size <= most for size, most in zip(sorted(sizes.values()), sorted(whole), strict=True))
    assert (
        len(floats)
        == {("tensor", "W4A8"): 1, ("channel", "W4A8"): 2, ("tensor", "W8A8"): 2, ("channel", "W8A8"): 6}[granularity, bits]
    )
    if bits == "W8A8":
        assert difference(student, images(30, SHAPE, seed=3)) < 1e-3


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_what_is_stored_is_the_students_weights(kinds: Network, images: Callable[..., Tensor], granularity: str) -> None:
    student = student_of(kinds, Samples(images(16, SHAPE)), plan="zeroq", weight_granularity=granularity)
    proto = to_onnx(student).proto
    stored, tables = initializers(proto), {}
    casts = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    for node in proto.graph.node:
        if node.op_type in ("Gather", "GatherElements") and node.input[1] in casts:
            table = numpy_helper.to_array(stored[node.input[0]])
            index = numpy_helper.to_array(stored[casts[node.input[1]]]).astype(np.int64)
            tables[node.input[0]] = table[index] if node.op_type == "Gather" else np.take_along_axis(table, index, 1)
    weights = {
        tensor.node.name: tensor.grid.fake(tensor_of(student.network.graph, tensor.node))
        for tensor in student.tensors()
        if tensor.kind == "weight"
    }
    stored_values = [np.sort(found, axis=None) for found in tables.values()]  # in whatever order of axes

    assert len(tables) == len(weights) == WEIGHTS
    for value in weights.values():
        assert any(np.array_equal(value.flatten().sort().values.numpy(), found) for found in stored_values)


def optimized(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model when it loads it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_levels_are_looked_up_when_the_file_is_loaded(
    kinds: Network, images: Callable[..., Tensor], tmp_path: Path, granularity: str
) -> None:
    proto = to_onnx(student_of(kinds, Samples(images(16, SHAPE)), weight_granularity=granularity)).proto
    before, after = (Counter(node.op_type for node in model.graph.node) for model in (proto, optimized(proto, tmp_path)))
    lookup = "Gather" if granularity == "tensor" else "GatherElements"

    assert before[lookup] >= 4
    assert before["Cast"] - after["Cast"] >= 4
    assert after[lookup] == after["Cast"] == 0


WHOLE = {TensorProto.INT8, TensorProto.INT32}  # ONNX Runtime's weights and biases, where it rounds those of a file


def check_levels_are_not_rounded(one: Network, samples: Samples, folder: Path, plan: str, granularity: str) -> None:
    student = student_of(one, samples, plan=plan, weight_granularity=granularity)
    stored = optimized(to_onnx(student).proto, folder).graph.initializer
    artifact = export(student, folder / "net.onnx", samples)

    assert not WHOLE.intersection(tensor.data_type for tensor in stored if np.prod(tensor.dims) > 1)
    assert artifact.verification.mean_difference < 1e-3 * student(samples.images).std()


@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_runtime_does_not_round_the_levels_again(
    network: Network, images: Callable[..., Tensor], tmp_path: Path, plan: str, granularity: str
) -> None:
    check_levels_are_not_rounded(network, Samples(images(40, network.input_shape, seed=9)), tmp_path, plan, granularity)


@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_nor_those_of_layers_of_other_kinds(
    kinds: Network, images: Callable[..., Tensor], tmp_path: Path, plan: str, granularity: str
) -> None:
    check_levels_are_not_rounded(kinds, Samples(images(40, kinds.input_shape, seed=9)), tmp_path, plan, granularity)


def test_the_runtime_does_not_round_layers_that_were_left_in_float(
    network: Network, calibration: Samples, tmp_path: Path
) -> None:
    layer = weighted_nodes(network.graph.graph)[1]  # it stands in a residual block, between quantized tensors
    student = quantize(network, calibration, bits="W8A8", layers={layer.name: {"keep_float": True}})
    stored = optimized(to_onnx(student).proto, tmp_path).graph.initializer
    weights = [tensor for tensor in stored if np.prod(tensor.dims) >= 7 * 7 * 9]

    assert student.float_layers() == [layer.name]
    assert [tensor.data_type for tensor in weights].count(TensorProto.FLOAT) == 1


def test_biases_stay_float(network: Network, calibration: Samples) -> None:
    proto = to_onnx(student_of(network, calibration)).proto

    assert TensorProto.INT32 not in {tensor.data_type for tensor in proto.graph.initializer}


def test_a_codebook_makes_a_smaller_file(images: Callable[..., Tensor]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x))))).mean((2, 3))
            return y

    wide = capture(Wide().eval(), SHAPE)
    floats = 4 * sum(tensor.numel() for tensor in wide.graph.buffers())
    for granularity, most in (("tensor", 0.17), ("channel", 0.23)):
        student = student_of(wide, Samples(images(4, SHAPE)), plan="zeroq", weight_granularity=granularity)
        assert to_onnx(student).proto.ByteSize() < most * floats


# --- what cannot be said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["activation", "bias"])
def test_a_codebook_on_anything_but_a_weight_is_refused(residual: Network, calibration: Samples, kind: str) -> None:
    student = quantize(residual, calibration)
    node = next(node for node in quantizer_nodes(student.network.graph.graph) if notes(node).kind == kind)
    quantizer_of(student.network.graph, node).grid = Codebook(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    name = node.all_input_nodes[0].name

    with pytest.raises(
        UnsupportedOperator, match=f"the {kind} {name} is quantized to a codebook; ONNX can write that of weights only"
    ):
        to_onnx(student)
