"""What `load_onnx` reads, keeps and refuses: names, shapes, files, messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from dreamquant.errors import ModelError, UnsupportedOperator
from dreamquant.network.graph import Network, input_node, output_nodes, tensor_of
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import notes, shape_of
from dreamquant.network.onnx_import import import_onnx, load_onnx
from dreamquant.network.opaque import is_opaque, node_of

aten = torch.ops.aten
Array = np.ndarray[Any, Any]


def floats(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def resized(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Resize", ["x", "", "s"], ["y"], "r", **attributes)


def images(name: str = "x", shape: tuple[Any, ...] | None = ("N", 3, 8, 8), dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Array] | None = None,
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: str = "y",
    opset: int = 17,
    **extra: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [images()] if inputs is None else inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in (tensors or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **extra)


RELU = [node("Relu", "x")]
CONVOLUTION = [node("Conv", "x w", "c"), node("Relu", "c")]
KERNEL = {"w": floats(4, 3, 3, 3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.onnx"


def load(path: Path, proto: onnx.ModelProto, **options: Any) -> Network:
    onnx.save(proto, str(path))
    return load_onnx(path, **options)


def nodes_of(network: Network, target: Any) -> list[fx.Node]:
    return [node for node in network.graph.graph.nodes if node.target == target]


def stored(network: Network) -> dict[str, fx.Node]:
    """The `get_attr` nodes by the name of the file's tensor."""
    return {notes(node).origin: node for node in network.graph.graph.nodes if node.op == "get_attr"}


def refusal(path: Path, proto: onnx.ModelProto | None = None, **options: Any) -> str:
    """The message with which a model is refused: one line that names the file."""
    if proto is not None:
        onnx.save(proto, str(path))
    with pytest.raises(ModelError) as caught:
        load_onnx(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_network_keeps_the_files_names(path: Path) -> None:
    network = load(path, model(CONVOLUTION, KERNEL))

    graph = network.graph.graph
    assert notes(input_node(graph)).origin == "x"
    assert [notes(node).origin for node in graph.nodes if node.op == "call_function"] == ["c", "y"]
    assert list(stored(network)) == ["w"]
    assert notes(output_nodes(graph)[0]).origin == "y"
    assert (network.input_shape, network.batch) == ((3, 8, 8), None)
    assert (network.source.kind, network.source.path, network.source.text) == ("onnx", path, str(path))
    assert network.source.proto == onnx.load(str(path))


def test_recorded_shapes_are_those_of_a_batch_of_two(path: Path) -> None:
    network = load(path, model(CONVOLUTION, KERNEL, inputs=[images(shape=(1, 3, 8, 8))]))
    recorded = {node.name: (shape_of(node), notes(node).dtype) for node in network.graph.graph.nodes if node.op != "output"}
    record_shapes(network.graph, torch.zeros(2, 3, 8, 8))

    assert recorded == {n.name: (shape_of(n), notes(n).dtype) for n in network.graph.graph.nodes if n.op != "output"}
    assert recorded["relu"] == ((2, 4, 6, 6), torch.float32)


def test_helper_nodes_have_no_origin(path: Path) -> None:
    network = load(path, model([node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], KERNEL))

    assert notes(nodes_of(network, aten.pad.default)[0]).origin is None
    assert notes(nodes_of(network, aten.conv2d.default)[0]).origin == "y"


def test_batch_norm_stays_with_its_statistics(path: Path) -> None:
    tensors = KERNEL | {"s": floats(4), "b": floats(4), "m": floats(4), "v": np.abs(floats(4))}
    network = load(path, model([node("Conv", "x w", "c"), node("BatchNormalization", "c s b m v", epsilon=0.01)], tensors))

    (norm,) = nodes_of(network, aten.batch_norm.default)
    assert [notes(argument).origin for argument in norm.args[1:5]] == ["s", "b", "m", "v"]
    assert norm.args[5] is False
    assert norm.args[7] == pytest.approx(0.01)


def test_matrix_stored_the_other_way_round_is_marked(path: Path) -> None:
    network = load(path, model([node("Flatten", "x", "f"), node("MatMul", "f w")], {"w": floats(192, 5)}))

    weight = stored(network)["w"]
    assert notes(weight).transposed is True
    assert tensor_of(network.graph, weight).shape == (5, 192)


def test_matrix_stored_as_torch_does_is_not_marked(path: Path) -> None:
    network = load(path, model([node("Flatten", "x", "f"), node("Gemm", "f w", transB=1)], {"w": floats(5, 192)}))

    assert not notes(stored(network)["w"]).transposed


def test_shared_tensor_is_stored_once(path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Identity", "w", "same"), node("Conv", "x same", "d"), node("Add", "c d")]
    network = load(path, model(nodes, KERNEL))

    assert len(stored(network)) == len(list(network.graph.named_buffers())) == 1
    assert len({convolution.args[1] for convolution in nodes_of(network, aten.conv2d.default)}) == 1


def test_names_that_are_no_identifiers_or_collide_become_attributes(path: Path) -> None:
    tensors = {
        "onnx::Conv/1": floats(3, 1, 1),
        "onnx/Conv:1": floats(3, 1, 1),
        "12": floats(3, 1, 1),
        "forward": floats(1),
    }
    nodes = [node("Sum", "x onnx::Conv/1", "a"), node("Sum", "a onnx/Conv:1", "b"), node("Sum", "b 12 forward")]
    network = load(path, model(nodes, tensors))

    assert set(stored(network)) == set(tensors)
    assert all(str(one.target).isidentifier() for one in stored(network).values())


def test_alpha_and_beta_leave_the_stored_tensors_as_they_are(path: Path) -> None:
    tensors = {"w": floats(5, 192), "b": floats(5)}
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w b", transB=1, alpha=0.5, beta=3.0)]
    network = load(path, model(nodes, tensors))

    for name, array in tensors.items():
        assert torch.equal(tensor_of(network.graph, stored(network)[name]), torch.from_numpy(array))


def test_shape_arithmetic_folds_away_and_the_batch_stays_free(path: Path) -> None:
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "batch"),
        node("Unsqueeze", "batch axis", "batch1"),
        node("Concat", "batch1 rest", "to", axis=0),
        node("Reshape", "x to"),
    ]
    tensors = {"zero": np.int64(0), "axis": np.array([0]), "rest": np.array([3, -1])}
    network = load(path, model(nodes, tensors))  # type: ignore[arg-type]

    assert network.batch is None
    assert [node.target for node in network.graph.graph.nodes if node.op == "call_function"] == [
        aten.sym_size.int,
        aten.reshape.default,
    ]
    assert network.graph(torch.zeros(5, 3, 8, 8)).shape == (5, 3, 64)


def test_constant_expanded_to_the_batch_is_stored_small(path: Path) -> None:
    nodes = [
        node("Shape", "x", "n", end=1),
        node("Concat", "n rest", "to", axis=0),
        node("Expand", "token to", "tokens"),
        node("Concat", "x tokens", axis=1),
    ]
    network = load(path, model(nodes, {"rest": np.array([2, 8, 8]), "token": floats(1, 2, 1, 8)}))

    assert network.batch is None
    assert tensor_of(network.graph, stored(network)["token"]).shape == (1, 2, 1, 8)
    assert notes(nodes_of(network, aten.expand.default)[0]).origin == "tokens"


def test_if_with_a_known_condition_becomes_its_branch(path: Path) -> None:
    branch = helper.make_graph([node("Relu", "x", "r")], "yes", [], [helper.make_tensor_value_info("r", 1, None)])
    other = helper.make_graph([node("Tanh", "x", "t")], "no", [], [helper.make_tensor_value_info("t", 1, None)])
    nodes = [
        node("Shape", "x", "s", start=1, end=2),
        node("Equal", "s three", "is"),
        helper.make_node("If", ["is"], ["y"], then_branch=branch, else_branch=other),
    ]
    network = load(path, model(nodes, {"three": np.array([3])}))

    assert [one.target for one in network.graph.graph.nodes if one.op == "call_function"] == [aten.relu.default]


def test_local_functions_are_inlined(path: Path) -> None:
    function = helper.make_function("acme", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 17)])
    network = load(path, model([node("Twice", "x", domain="acme")], functions=[function]))

    assert len(nodes_of(network, aten.add.Tensor)) == 1
    assert not network.source.proto.functions  # type: ignore[union-attr]


def test_initializer_listed_as_input_is_not_an_input(path: Path) -> None:
    proto = model(CONVOLUTION, KERNEL, inputs=[images(), images("w", (4, 3, 3, 3))])
    proto.ir_version = 3

    assert load(path, proto).input_shape == (3, 8, 8)


def test_several_outputs_come_in_the_files_order(path: Path) -> None:
    network = load(path, model([node("Relu", "x", "a"), node("Neg", "x", "b")], outputs="b a"))

    assert [notes(node).origin for node in output_nodes(network.graph.graph)] == ["b", "a"]


def test_external_data_is_read(path: Path) -> None:
    proto = model(CONVOLUTION, KERNEL)
    onnx.save(proto, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    network = load_onnx(path)

    assert torch.equal(tensor_of(network.graph, stored(network)["w"]), torch.from_numpy(KERNEL["w"]))


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), (b"", "empty"), (b"no model\n", "not an ONNX file")])
def test_file_that_is_no_model(path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        path.write_bytes(content)

    assert reason in refusal(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_file_cut_short(path: Path, share: float) -> None:
    onnx.save(model(CONVOLUTION, KERNEL), str(path))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])

    assert "cut short" in refusal(path) or "damaged" in refusal(path)


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_external_data_missing_or_cut_short(path: Path) -> None:
    onnx.save(model(CONVOLUTION, KERNEL), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = path.parent / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "'w'" in refusal(path)

    weights.unlink()
    assert "external data" in refusal(path)
    assert "weights.bin" in refusal(path)


def test_broken_graph(path: Path) -> None:
    proto = model([node("Relu", "nowhere")])
    assert "'nowhere', which nothing computes" in refusal(path, proto)

    proto.graph.output[0].CopyFrom(images("y"))
    assert "is not a valid ONNX model" in refusal(path, proto)


def test_output_that_nothing_computes() -> None:
    with pytest.raises(ModelError, match="its output 'z' is computed by no node"):
        import_onnx(model(RELU, outputs="z"), name="tiny")


def test_weights_that_are_not_finite(path: Path) -> None:
    kernel = floats(4, 3, 3, 3)
    kernel[0, 0], kernel[1, 0, 0, 0] = np.nan, np.inf

    assert refusal(path, model(CONVOLUTION, {"w": kernel})) == "tensor 'w' holds 10 values that are NaN or infinite"


def test_infinite_mask_is_no_fault(path: Path) -> None:
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    network = load(path, model([node("Add", "x m", "a"), node("Softmax", "a")], {"m": mask}))

    assert "m" in stored(network)


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        ([], "none"),
        ([images(), images("z", (1,))], "'x' float32 (N, 3, 8, 8); 'z' float32 (1)"),
        ([images(shape=("N", 3))], "'x' float32 (N, 3)"),
        ([images(dtype=TensorProto.DOUBLE)], "'x' float64 (N, 3, 8, 8)"),
    ],
    ids=["none", "two", "flat", "double"],
)
def test_inputs_that_are_not_images(inputs: list[onnx.ValueInfoProto], shown: str) -> None:
    nodes = [node("Relu", "x")] if inputs else [node("Constant", "", value_float=1.0)]
    with pytest.raises(ModelError, match="tiny: ") as caught:
        import_onnx(model(nodes, inputs=inputs), name="tiny")

    assert shown in str(caught.value)


@pytest.mark.parametrize("shape", [("N", 3, "h", "w"), ("N", 3, None, 8), None], ids=["named", "open", "unknown"])
def test_open_sizes_need_an_input_shape(path: Path, shape: Any) -> None:
    proto = model(RELU, inputs=[images(shape=shape)])

    assert "--input-shape" in refusal(path, proto)
    assert load(path, proto, input_shape=(3, 8, 8)).input_shape == (3, 8, 8)


def test_input_shape_that_contradicts_the_file(path: Path) -> None:
    assert "--input-shape 3,8,16 contradicts" in refusal(path, model(RELU), input_shape=(3, 8, 16))


def test_half_precision_weights_are_read_as_float32(path: Path) -> None:
    nodes = [
        node("Cast", "x", "h", to=TensorProto.FLOAT16),
        node("Mul", "h w", "m"),
        node("Cast", "m", to=TensorProto.FLOAT),
    ]
    weight = floats(1).astype(np.float16)
    network = load(path, model(nodes, {"w": weight}))

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x), x * torch.from_numpy(weight.astype(np.float32)))


def test_a_file_in_half_precision_keeps_the_types_of_its_input_and_output(path: Path) -> None:
    proto = model([node("Mul", "x w")], {"w": floats(1).astype(np.float16)}, inputs=[images(dtype=TensorProto.FLOAT16)])
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    network = load(path, proto)

    assert network.space.dtype == "float16"
    kept = network.source.proto
    assert kept is not None
    assert [value.type.tensor_type.elem_type for value in (*kept.graph.input, *kept.graph.output)] == [TensorProto.FLOAT16] * 2
    assert [one.op_type for one in kept.graph.node] == ["Cast", "Mul", "Cast"]


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.UINT8], ids=["float", "bytes"])
def test_channels_last_and_bytes_are_taken_apart_at_the_front(path: Path, dtype: int) -> None:
    cast = [node("Cast", "x", "f", to=TensorProto.FLOAT)] if dtype == TensorProto.UINT8 else []
    nodes = [*cast, node("Transpose", "f" if cast else "x", "t", perm=[0, 3, 1, 2]), node("Conv", "t w", "y")]
    proto = model(nodes, {"w": floats(2, 3, 1, 1)}, inputs=[images(shape=("N", 8, 9, 3), dtype=dtype)])
    network = load(path, proto)

    assert (network.input_shape, network.space.layout) == ((3, 8, 9), "NHWC")
    assert network.space.dtype == ("uint8" if cast else "float32")
    assert [one.target for one in network.graph.graph.nodes if one.op == "call_function"] == [torch.ops.aten.conv2d.default]
    assert notes(input_node(network.graph.graph)).origin == "t"
    assert network.input_name == "x"
    assert load(path, proto, layout="NHWC").input_shape == (3, 8, 9)


def test_quantized_network(path: Path) -> None:
    tensors = {"s": np.float32(0.1), "z": np.uint8(0)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")]

    assert refusal(path, model(nodes, tensors)).startswith("is already quantized")  # type: ignore[arg-type]


def test_all_unsupported_operators_are_named_at_once(path: Path) -> None:
    nodes = [
        node("Foo", "x", "a", domain="acme"),
        node("Foo", "a", "b", domain="acme"),
        node("Foo", "b", "c", domain="acme"),
        node("RandomNormalLike", "c"),
    ]
    onnx.save(model(nodes), str(path))
    with pytest.raises(UnsupportedOperator) as caught:
        load_onnx(path)

    assert str(caught.value) == (
        f"{path}: operator Foo (domain acme) is not supported: node 'Foo_a' and 2 more; also RandomNormalLike: node 'RandomNormalLike_y'"
    )


UPSAMPLED = {"s": np.array([1, 1, 2, 2], np.float32)}


@pytest.mark.parametrize(
    ("nodes", "tensors", "operator"),
    [
        ([resized(mode="linear", antialias=1)], {"s": np.array([1, 1, 0.5, 0.5], np.float32)}, "Resize"),
        ([resized(mode="linear", coordinate_transformation_mode="asymmetric")], UPSAMPLED, "Resize"),
        ([resized(mode="cubic", cubic_coeff_a=-0.5)], UPSAMPLED, "Resize"),
        ([node("CumSum", "x a", reverse=1)], {"a": np.int64(1)}, "CumSum"),
        ([node("ArgMax", "x", "i", axis=1, select_last_index=1), node("Cast", "i", to=1)], {}, "ArgMax"),
        ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], {}, "MaxPool"),
        ([node("Cast", "x", "h", to=TensorProto.DOUBLE), node("Cast", "h", to=1)], {}, "Cast"),
        ([node("Pad", "x p", mode="edge")], {"p": np.array([0, 1, 0, 0, 0, 0, 0, 0])}, "Pad"),
        ([node("AveragePool", "x", kernel_shape=[2, 2], dilations=[2, 2])], {}, "AveragePool"),
        ([node("MaxPool", "x", kernel_shape=[2, 2], pads=[0, 0, 1, 1], ceil_mode=1)], {}, "MaxPool"),
    ],
)
def test_what_has_no_counterpart_for_its_attributes_stays_as_it_is(
    nodes: list[onnx.NodeProto], tensors: dict[str, Array], operator: str, path: Path
) -> None:
    network = load(path, model(nodes, tensors, opset=19))

    assert [node_of(one).op_type for one in network.graph.graph.nodes if is_opaque(one)] == [operator]
    assert network.batch is None


def test_what_has_no_counterpart_and_no_layer_before_it_is_named(path: Path) -> None:
    proto = model([node("NonZero", "x", "i"), node("Cast", "i", to=1)])

    assert refusal(path, proto) == "node 'NonZero_i' (NonZero) has no counterpart; no layer comes before it"


def test_size_that_depends_on_the_images_is_refused() -> None:
    nodes = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "n", to=TensorProto.INT64),
             node("Unsqueeze", "n axis", "s"), node("Expand", "x s")]  # fmt: skip
    with pytest.raises(UnsupportedOperator, match="depends on the images"):
        import_onnx(model(nodes, {"axis": np.array([0])}), name="tiny")


def test_network_that_cannot_be_run() -> None:
    nodes = [node("ArgMax", "x", "i", axis=2, keepdims=0), node("Gather", "w i")]
    with pytest.raises(ModelError, match=r"tiny: cannot be run on images \(3, 8, 8\): "):
        import_onnx(model(nodes, {"w": floats(2, 4)}), name="tiny")


def test_old_opset(path: Path) -> None:
    assert load(path, model(RELU, opset=9)).source.proto.opset_import[0].version == 13  # type: ignore[union-attr]
    assert "opset 6" in refusal(path, model(RELU, opset=6))


def test_disagreement_with_onnx_runtime_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamquant.network.onnx_import.builder import OPERATORS

    monkeypatch.setitem(OPERATORS, "Relu", lambda op: op.call(aten.tanh.default, op.tensor(0)))

    assert "ONNX Runtime disagree on noise: output 'y' differs by" in refusal(path, model(RELU))


def test_global_random_state_is_left_alone(path: Path) -> None:
    before = torch.random.get_rng_state()
    load(path, model(CONVOLUTION, KERNEL))

    assert torch.equal(torch.random.get_rng_state(), before)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x * self.gate(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.block(x)[:, 0])  # type: ignore[no-any-return]


@pytest.fixture
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx warns about its own inner workings."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_quiet_exporter")
@pytest.mark.parametrize("batch", ["free", "one"])
@pytest.mark.parametrize("module", [SqueezeExcite, Transformer])
def test_what_torch_exports(module: type[nn.Module], batch: str, path: Path) -> None:
    pytest.importorskip("onnxscript")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = module().eval()
    example = torch.zeros(2 if batch == "free" else 1, 3, 16, 16)
    sizes = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if batch == "free" else {}
    torch.onnx.export(network, (example,), str(path), dynamo=True, verbose=False, **sizes)  # type: ignore[arg-type]
    loaded = load_onnx(path)

    assert loaded.batch is None
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(noise), network(noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "shape", "convolutions"),
    [
        ("cifar10/resnet20_bnfolded.onnx", (3, 32, 32), 19),
        ("imagenet/mobilenetv1_025_bnfolded.onnx", (3, 224, 224), 27),
        ("imagenet/squeezenet1_1.onnx", (3, 224, 224), 26),
        ("imagenet/mobilenetv2_imagenette.onnx", (3, 224, 224), 53),
        ("coco/yolox_nano.onnx", (3, 416, 416), 113),
    ],
)
def test_real_network(file: str, shape: tuple[int, int, int], convolutions: int, data_dir: Path) -> None:
    network = load_onnx(data_dir / file)

    assert network.input_shape == shape
    assert network.batch is None
    assert len(nodes_of(network, aten.conv2d.default)) == convolutions
