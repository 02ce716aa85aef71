"""Small operations on an ONNX model leave everything else as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dreamquant.errors import ModelError, UnsupportedOperator
from dreamquant.exporters.surgery import Surgery


def floats(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(values, np.float32)


def model(opset: int = 13) -> onnx.ModelProto:
    """x -> Add(w) -> a -> Relu -> y, and z = Mul(a, c) with c from a Constant node; `unused` is read by nobody."""
    constant = helper.make_node("Constant", [], ["c"], name="constant", value=numpy_helper.from_array(floats(2, 2)))
    graph = helper.make_graph(
        [
            constant,
            helper.make_node("Add", ["x", "w"], ["a"], name="add"),
            helper.make_node("Relu", ["a"], ["y"], name="relu"),
            helper.make_node("Mul", ["a", "c"], ["z"], name="mul"),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "w")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("y", "z")],
        [numpy_helper.from_array(floats(1, -1), "w"), numpy_helper.from_array(floats(9), "unused")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(proto, {"who": "me"})
    return proto


def names(proto: onnx.ModelProto) -> list[str]:
    return [node.name for node in proto.graph.node]


def test_nothing_done_is_nothing_changed() -> None:
    proto = model()

    assert Surgery(proto).finish() == proto == model()


def test_the_model_given_is_not_changed() -> None:
    proto = model()
    surgery = Surgery(proto)
    surgery.replace_constant("w", floats(5, 5))
    surgery.rename_output("a", "b")
    surgery.insert("Abs", ["b"], "a", after="b")
    surgery.remove("y")
    surgery.finish()

    assert proto == model()


def test_names_are_never_given_twice() -> None:
    surgery = Surgery(model())

    assert surgery.fresh("a") == "a_1"
    assert surgery.fresh("a") == "a_2"
    assert surgery.fresh("w") == "w_1"
    assert surgery.fresh("new") == "new"
    assert surgery.constant("new", floats(1)) == "new_1"
    surgery.insert("relu", ["x"], "one")
    surgery.insert("relu", ["x"], "two")
    assert len({node.name for node in surgery.nodes}) == 6


def test_a_node_is_put_behind_what_it_reads() -> None:
    surgery = Surgery(model())
    surgery.rename_output("a", "b")
    surgery.insert("Abs", ["b"], "a", after="b")
    made = surgery.finish()

    assert names(made) == ["constant", "add", "Abs", "relu", "mul"]
    onnx.checker.check_model(made, full_check=True)


def test_readers_are_moved_all_or_some() -> None:
    surgery = Surgery(model())
    surgery.insert("Abs", ["a"], "b", after="a")
    surgery.rewire("a", "b", [node for node in surgery.consumers("a") if node.op_type == "Mul"])

    assert [list(node.input) for node in surgery.nodes if node.op_type in ("Relu", "Mul")] == [["a"], ["b", "c"]]
    surgery.rewire("c", "w")
    assert next(node for node in surgery.nodes if node.op_type == "Mul").input == ["b", "w"]


def test_stored_tensors_get_other_values_wherever_they_stand() -> None:
    surgery = Surgery(model())
    surgery.replace_constant("w", floats(7, 8))
    surgery.replace_constant("c", floats(3, 4))
    made = surgery.finish()

    assert numpy_helper.to_array(made.graph.initializer[0]).tolist() == [7, 8]
    assert numpy_helper.to_array(made.graph.node[0].attribute[0].t).tolist() == [3, 4]
    with pytest.raises(ModelError, match="a is not a stored tensor"):
        surgery.replace_constant("a", floats(1))


def test_what_lost_its_readers_goes_and_what_never_had_any_stays() -> None:
    surgery = Surgery(model())
    surgery.rewire("w", surgery.constant("v", floats(0, 0)))
    surgery.rewire("c", "v")
    surgery.constant("never_read", floats(1))
    made = surgery.finish()

    assert [tensor.name for tensor in made.graph.initializer] == ["unused", "v"]
    assert [value.name for value in made.graph.input] == ["x"]  # w was listed as an input with a default
    assert names(made) == ["add", "relu", "mul"]


@pytest.mark.parametrize("operation", ["remove", "rename"])
def test_what_no_node_computes_cannot_be_moved(operation: str) -> None:
    surgery = Surgery(model())
    with pytest.raises(ModelError, match="x is computed by no node"):
        surgery.remove("x") if operation == "remove" else surgery.rename_output("x", "y2")


def test_an_opset_is_raised_and_the_rest_kept() -> None:
    surgery = Surgery(model(11))
    surgery.require_opset(21)
    made = surgery.finish()

    assert [(entry.domain, entry.version) for entry in made.opset_import] == [("", 21)]
    assert {entry.key: entry.value for entry in made.metadata_props} == {"who": "me"}
    assert [node.op_type for node in made.graph.node] == ["Constant", "Add", "Relu", "Mul"]
    assert names(made) == names(model())
    assert [value.name for value in made.graph.output] == ["y", "z"]


def test_an_opset_is_never_lowered() -> None:
    surgery = Surgery(model(17))
    surgery.require_opset(13)

    assert surgery.finish() == model(17)


def test_an_opset_that_cannot_be_raised_is_one_sentence() -> None:
    proto = model(11)
    proto.graph.node.append(helper.make_node("Invented", ["y", "w"], ["u"], name="new"))
    with pytest.raises(UnsupportedOperator, match="has opset 11, 21 is needed, and it cannot be raised") as caught:
        Surgery(proto).require_opset(21)
    assert "\n" not in str(caught.value)
