"""Each rule is broken by one change of a file that keeps it, and says which node does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dreamquant.conformity import RULES, Finding, check, conformity
from dreamquant.errors import ModelError
from dreamquant.quantization.plan import Plan, Rule, Target, load_plan, target_names


class Built:
    """A quantized convolution, ReLU, pooling and sigmoid, with Q/DQ on every tensor, as a file that keeps all rules of `PLAN`."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, NDArray[Any]] = {}
        weight = (np.arange(16 * 3 * 9).reshape(16, 3, 3, 3) % 120 - 60).astype(np.int8)
        self.quantized("x", "x_dq", 0.5, 7)
        self.weight("w", weight, 0.25)
        self.stored |= {"b_q": np.arange(16, dtype=np.int32), "b_scale": np.float32(0.125)}
        self.add("DequantizeLinear", ["b_q", "b_scale"], "b")
        self.add("Conv", ["x_dq", "w", "b"], "conv")
        self.add("Relu", ["conv"], "relu")
        self.quantized("relu", "relu_dq", 0.25, 0)
        self.add("MaxPool", ["relu_dq"], "pool", kernel_shape=[2, 2])
        self.quantized("pool", "pool_dq", 0.25, 0)
        self.add("Sigmoid", ["pool_dq"], "sigmoid")
        self.quantized("sigmoid", "y", 1 / 256, 0)

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{output}_node", **attributes))

    def quantized(self, source: str, result: str, scale: float, zero: int) -> None:
        self.stored |= {f"{source}_scale": np.float32(scale), f"{source}_zero": np.uint8(zero)}
        own = [f"{source}_scale", f"{source}_zero"]
        self.add("QuantizeLinear", [source, *own], f"{source}_q")
        self.add("DequantizeLinear", [f"{source}_q", *own], result)

    def weight(self, name: str, integers: NDArray[Any], scale: float) -> None:
        self.stored |= {f"{name}_q": integers, f"{name}_scale": np.float32(scale), f"{name}_zero": integers.dtype.type(0)}
        self.add("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], name)

    def node(self, output: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if node.output[0] == output)

    def take_out(self, source: str, result: str) -> None:
        """Let who reads `result`, a tensor back from integers, read `source` itself."""
        self.nodes = [node for node in self.nodes if node.output[0] not in (result, f"{source}_q")]
        for node in self.nodes:
            node.input[:] = [source if name == result else name for name in node.input]

    def proto(self, sizes: tuple[int | str, ...] = (1, 3, 6, 6)) -> onnx.ModelProto:
        taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(sizes))
        given = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in self.stored.items()]
        graph = helper.make_graph(self.nodes, "built", [taken], [given], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


PLAN = load_plan("deploy").model_dump() | {
    "name": "made up",
    "placement": "every_tensor",
    "weight_narrow": True,
    "saturation_free": True,
    "fixed": [{"operator": "sigmoid", "bits": 8, "steps": 256, "zero_point": 0}],
    "target": Target(runtime="none", source="none", activation_bits=[8], weight_bits=[8], static_shapes=True),
}


def broken(built: Built, proto: onnx.ModelProto | None = None, **changes: Any) -> dict[Rule, list[Finding]]:
    found = conformity(built.proto() if proto is None else proto, Plan(**(PLAN | changes)))
    return {rule: [one for one in found.findings if one.rule == rule] for rule, count in found.counts.items() if count}


def test_the_file_keeps_every_rule() -> None:
    assert broken(Built()) == {}
    assert set(conformity(Built().proto(), Plan(**PLAN)).counts) == set(RULES)


def set_to(name: str, value: NDArray[Any] | np.generic) -> Callable[[Built], None]:
    return lambda built: built.stored.update({name: np.asarray(value)})


def wide_scale(built: Built) -> None:
    built.stored |= {"w_scale": np.full(16, 0.25, np.float32), "w_zero": np.zeros(16, np.int8)}
    built.node("w").attribute.append(helper.make_attribute("axis", 0))
    built.stored |= {"b_scale": np.full(16, 0.125, np.float32)}
    built.node("b").attribute.append(helper.make_attribute("axis", 0))


def wrong_axis(built: Built) -> None:
    built.stored |= {"w_scale": np.full(3, 0.25, np.float32), "w_zero": np.zeros(3, np.int8)}
    built.node("w").attribute.append(helper.make_attribute("axis", 1))


def signed_activation(built: Built) -> None:
    built.stored["relu_zero"] = built.stored["pool_zero"] = np.int8(0)


def float_bias(built: Built) -> None:
    built.nodes.remove(built.node("b"))
    built.stored["b"] = np.zeros(16, np.float32)


def two_scales(built: Built) -> None:
    built.stored |= {"relu_scale": np.full(16, 0.25, np.float32), "relu_zero": np.zeros(16, np.uint8)}
    built.stored |= {"pool_scale": np.full(16, 0.25, np.float32), "pool_zero": np.zeros(16, np.uint8)}


def operator_of_integers(built: Built) -> None:
    built.add("ConvInteger", ["x_q", "w_q"], "more")


def computed_scale(built: Built) -> None:
    built.add("ReduceMax", ["x"], "scale")
    built.node("relu_q").input[1] = "scale"


def nothing(built: Built) -> None:
    built.nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]


CASES: list[tuple[str, Rule, Callable[[Built], None], dict[str, Any], str, str]] = [
    ("an operator of integers", "form", operator_of_integers, {}, "ConvInteger more_node", "no operator between"),
    ("a scale that is computed", "form", computed_scale, {}, "QuantizeLinear relu_q_node", "scale that is computed"),
    ("a float file", "form", nothing, {}, "the file", "no QuantizeLinear"),
    ("signed activations", "types", signed_activation, {}, "behind Relu relu_node", "int8, activations are of uint8"),
    (
        "weights of 4 bits alone",
        "types",
        lambda _: None,
        {"target": {**PLAN["target"].model_dump(), "weight_bits": [4]}},
        "Conv conv_node",
        "weights of int8, they are of int4",
    ),
    ("an asymmetric tensor", "zero_points", lambda _: None, {"activation_zero_point": "middle"}, "of x", "zero point 7, not 128"),
    (
        "neither end nor middle",
        "zero_points",
        lambda _: None,
        {"activation_zero_point": "ends"},
        "of x",
        "zero point 7, not 0 or 128",
    ),
    ("an asymmetric weight", "zero_points", set_to("w_zero", np.int8(3)), {}, "Conv conv_node", "zero point 3, not 0"),
    (
        "the least integer",
        "narrow_weights",
        set_to("w_q", np.full((16, 3, 3, 3), -128, np.int8)),
        {},
        "Conv conv_node",
        "432 weights at -128",
    ),
    (
        "no power of two",
        "scales",
        set_to("x_scale", np.float32(0.3)),
        {"scales": "power_of_two", "saturation_free": False},
        "behind QuantizeLinear x_q_node",
        "no power of two",
    ),
    ("a small range", "scales", set_to("x_scale", np.float32(1e-7)), {"minimum_range": 1e-4}, "of x", "the least is 0.0001"),
    ("activations by channel", "granularity", two_scales, {}, "behind Relu relu_node", "16 scales, activations have one"),
    ("weights by channel", "granularity", wide_scale, {"per_tensor": ["conv"]}, "Conv conv_node", "16 scales, they have one"),
    ("weights by input channel", "granularity", wrong_axis, {}, "Conv conv_node", "along axis 1, output channels are axis 0"),
    ("a float bias", "bias", float_bias, {}, "Conv conv_node", "bias in float, not in int32"),
    ("an integer bias", "bias", lambda _: None, {"bias": "float"}, "Conv conv_node", "bias in int32, not in float"),
    ("a bias of 32 bits", "bias", lambda _: None, {"bias": "int8"}, "Conv conv_node", "bias of int32, not int8"),
    (
        "a bias on a scale of its own",
        "bias",
        set_to("b_scale", np.float32(0.1)),
        {},
        "Conv conv_node",
        "times that of its weights",
    ),
    ("a free sigmoid", "fixed", set_to("sigmoid_scale", np.float32(1 / 255)), {}, "Sigmoid sigmoid_node", "not 1/256 and 0"),
    ("a pooling between two grids", "ties", set_to("pool_scale", np.float32(0.2)), {}, "MaxPool pool_node", "have to be one"),
    (
        "a float tensor inside",
        "placement",
        lambda built: built.take_out("pool", "pool_dq"),
        {},
        "MaxPool pool_node",
        "gives pool in float",
    ),
    (
        "a float reader",
        "placement",
        lambda built: built.take_out("pool", "pool_dq"),
        {},
        "Sigmoid sigmoid_node",
        "reads pool in float",
    ),
    ("a float image", "placement", lambda built: built.take_out("x", "x_dq"), {}, "the input x", "read in float"),
    ("a sigmoid of integers", "placement", lambda _: None, {"placement": "inputs"}, "Sigmoid sigmoid_node", "runs in float"),
    (
        "an output of integers",
        "placement",
        lambda _: None,
        {"placement": "inputs"},
        "DequantizeLinear y_node",
        "gives the output y",
    ),
    (
        "few channels",
        "too_small",
        set_to("w_q", np.zeros((12, 3, 3, 3), np.int8)),
        {"float_below_channels": 16},
        "Conv conv_node",
        "too few channels",
    ),
    (
        "large neighbours",
        "saturation_free",
        set_to("w_q", np.full((16, 3, 3, 3), 100, np.int8)),
        {},
        "Conv conv_node",
        "sum 200, the largest is 128",
    ),
]


@pytest.mark.parametrize(
    ("rule", "change", "plan", "node", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_rule_is_broken(rule: Rule, change: Callable[[Built], None], plan: dict[str, Any], node: str, text: str) -> None:
    built = Built()
    change(built)

    found = broken(built, **plan).get(rule, [])

    assert any(node in one.node and text in one.text for one in found), found
    assert all("\n" not in str(one) for one in found)


def test_open_sizes_are_told() -> None:
    found = broken(Built(), Built().proto(("batch", 3, 6, 6)))

    assert list(found) == ["static_shapes"]
    assert "the input x has sizes that are open: (batch, 3, 6, 6)" in str(found["static_shapes"][0])


def test_sides_of_a_sum_share_a_grid_where_they_have_to() -> None:
    built = Built()
    built.add("Add", ["x_dq", "more_dq"], "sum")
    built.stored["more"] = np.ones((1, 3, 6, 6), np.float32)
    built.quantized("more", "more_dq", 0.5, 7)
    built.add("Mul", ["x_dq", "pool_dq"], "product")

    found = broken(built, ties=["elementwise"])["ties"]

    assert [one.node for one in found] == ["Mul product_node"]
    assert "0.25, 0.5 at 7" in found[0].text


def test_a_constant_in_float_is_told_beside_integers() -> None:
    built = Built()
    built.stored["half"] = np.float32(0.5)
    built.add("Mul", ["pool_dq", "half"], "scaled")
    built.quantized("scaled", "scaled_dq", 0.125, 0)

    assert any("the stored half in float" in one.text for one in broken(built)["placement"])


def test_every_rule_has_a_case() -> None:
    assert {case[1] for case in CASES} | {"static_shapes"} == set(RULES)
    assert all(set(load_plan(name).target.rules) <= set(RULES) for name in target_names())  # type: ignore[union-attr]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    built = Built()
    del built.node("x_q").input[1:]
    onnx.save(built.proto(), tmp_path / "file.onnx")

    with pytest.raises(ModelError, match="cannot be checked") as caught:
        check(tmp_path / "file.onnx", "qnn")
    assert "\n" not in str(caught.value)


class Reader:
    """Images for ONNX Runtime's own quantizer."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.images: Iterator[dict[str, NDArray[Any]]] = iter(
            [{"input": draw.normal(size=(1, 1, 16, 16)).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.images, None)


def test_files_of_another_quantizer_are_told_by_node(digits: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    source, path = digits / "digits_bnfolded.onnx", tmp_path / "file.onnx"
    quantize_static(
        source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    proto = onnx.load(path)
    nodes = {node.name for node in proto.graph.node}

    kept, found = conformity(proto, load_plan("onnxruntime-vnni")), conformity(proto, load_plan("tensorrt"))

    assert kept.conforms, kept.findings
    assert found.counts["types"] > 0
    assert found.counts["bias"] == sum(node.op_type in ("Conv", "Gemm") for node in proto.graph.node)
    assert all(one.node.split()[1] in nodes for one in found.findings if one.rule == "bias")

    quantize_static(source, path, Reader(), quant_format=QuantFormat.QOperator)
    assert any("QLinearConv" in one.node for one in conformity(onnx.load(path), load_plan("qnn")).findings if one.rule == "form")
