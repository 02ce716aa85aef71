"""Hostile ONNX files: valid small networks, changed in one place or in a few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from tests.fuzz.cases import DIGITS, QUICK, Case, hostile

Change = Callable[[Random, onnx.ModelProto], object]
CHANGES: list[Change] = []
SIZES = (0, -1, 1, 7, 4096, 2**20, 2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63))
TYPES = (*range(30), 999, 2**31 - 1, -1)
NAMES = ("", " ", "a\nb", "\x1b[31mred", "\u202etxt", "x" * 70000, "../../x", "/", "\x00", "input", "é", "\U0001f600")
FLOATS = (0.0, -1.0, 0.5, 1e38, -1e38, 1e-45, float("nan"), float("inf"), float("-inf"), 1e9, 3e4)


def change(function: Change) -> Change:
    CHANGES.append(function)
    return function


def array(name: str, values: object, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


def small(
    random: Random, *, shape: tuple[object, ...] = ("n", 3, 8, 8), middle: tuple[onnx.NodeProto, ...] = ()
) -> onnx.ModelProto:
    """A convolution, `middle` (from `c` to `m`), a pooling and a layer: images (3, 8, 8) -> five scores."""
    weights = np.random.default_rng(random.randrange(2**32))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        *(middle or (helper.make_node("Relu", ["c"], ["m"], name="relu"),)),
        helper.make_node("GlobalAveragePool", ["m"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "v", "b"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [array("w", weights.normal(size=(4, 3, 3, 3))), array("v", weights.normal(size=(4, 5))), array("b", np.zeros(5))],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", random.choice((13, 17, 18, 21)))], ir_version=9)
    for key, value in (("mean", "0.5,0.5,0.5"), ("std", "0.5,0.5,0.5")):
        proto.metadata_props.add(key=f"dreamquant.{key}", value=value)
    return proto


def valid(random: Random) -> onnx.ModelProto:
    return onnx.load(DIGITS / "digits_bnfolded.onnx") if random.random() < 0.3 else small(random)


def command(random: Random, name: str) -> tuple[str, ...]:
    """One of the commands that read a model."""
    data = str(DIGITS / "digits_test.npz")
    stated = ("--mean", "0", "--std", "1") if random.random() < 0.2 else ()
    return random.choice(
        (
            ("inspect", name),
            ("inspect", name, "--input-shape", "3,8,8"),
            ("quantize", name, "-o", "out.onnx", *QUICK),
            ("quantize", name, "-o", "out.onnx", "--bits", "W4A8", *QUICK),
            ("synthesize", name, "-o", "out.npz", "--method", random.choice(("noise", "fractal")), "-n", "2"),
            ("evaluate", name, data, *stated),
            ("compare", name, str(DIGITS / "digits_bnfolded.onnx"), "-n", "2", "--rounds", "1"),
            ("compare", name, name, "-n", "2", "--rounds", "1"),
        )
    )


def case(title: str, random: Random, folder: Path, data: bytes) -> Case:
    (folder / "model.onnx").write_bytes(data)
    return Case(title, command(random, "model.onnx"))


@hostile("onnx")
@hostile("onnx")
@hostile("onnx")
@hostile("onnx")
def changed(random: Random, folder: Path) -> Case:
    proto = valid(random)
    done = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        one = random.choice(CHANGES)
        try:
            one(random, proto)
            done.append(one.__name__)
        except (ValueError, IndexError, TypeError):  # what an earlier change has taken away cannot be changed
            continue
    try:
        return case(" + ".join(done), random, folder, proto.SerializeToString())
    except ValueError:  # nested too deeply to be written
        return case("an empty file", random, folder, b"")


@hostile("onnx")
def bytes_changed(random: Random, folder: Path) -> Case:
    data = bytearray(valid(random).SerializeToString())
    kind = random.choice(("flipped", "cut", "doubled", "zeroed", "inserted"))
    place = random.randrange(len(data)) if random.random() < 0.5 else random.randrange(min(400, len(data)))
    if kind == "flipped":
        for _ in range(random.choice((1, 3, 30))):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "doubled":
        data += bytes(data)
    elif kind == "zeroed":
        data[place : place + 16] = bytes(16)
    else:
        data[place:place] = random.randbytes(random.choice((1, 4, 100)))
    return case(f"bytes {kind}", random, folder, bytes(data))


@hostile("onnx")
def bytes_of_a_name(random: Random, folder: Path) -> Case:
    """Names that are no UTF-8, or hold halves of surrogate pairs."""
    proto = small(random)
    proto.graph.node[0].name = "NAMENAME"
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "WEIGHTSS"
    proto.graph.node[1].output[0] = proto.graph.node[2].input[0] = "MIDDLEEE"
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "IMAGESSS"
    proto.metadata_props.add(key="METAMETA", value="METAMETA")
    proto.producer_name = "PRODUCER"
    data = proto.SerializeToString()
    wanted = random.choice((b"\xff\xfe\x80\x81abcd", b"\xed\xa0\x80\xed\xb0\x80ab", b"\xc0\x80\xc0\x80abcd", b"a\x00b\x1b[2J\n"))
    name = random.choice((b"NAMENAME", b"WEIGHTSS", b"MIDDLEEE", b"IMAGESSS", b"METAMETA", b"PRODUCER"))
    return case(f"{name!r} is {wanted!r}", random, folder, data.replace(name, wanted))


@hostile("onnx")
@hostile("onnx")
def grown(random: Random, folder: Path) -> Case:
    """An operator in the middle that asks for much, of the images or of constants."""
    size = random.choice((64, 2**12, 2**16, 2**20, 2**31, 2**40, 2**62))
    side = random.choice((2.0, 1e3, 1e5, 1e9, 1e38, float("inf"), float("nan"), -1.0, 0.0))
    constant: list[onnx.TensorProto] = []
    kind = random.choice(
        (
            "Resize",
            "ResizeTo",
            "Pad",
            "Tile",
            "Expand",
            "ConstantOfShape",
            "Range",
            "Conv",
            "OneHot",
            "MatMul",
            "ConvTranspose",
            "Concat",
        )
    )
    if kind == "Resize":
        constant = [array("s", [1, 1, side, side])]
        middle = [helper.make_node("Resize", ["c", "", "s"], ["m"], mode=random.choice(("nearest", "linear", "cubic")))]
    elif kind == "ResizeTo":
        constant = [array("s", [1, 4, size, size], np.int64)]
        middle = [helper.make_node("Resize", ["c", "", "", "s"], ["m"], mode=random.choice(("nearest", "linear")))]
    elif kind == "Pad":
        constant = [array("s", [0, 0, size, size, 0, 0, random.choice((0, size, -size)), 0], np.int64)]
        middle = [helper.make_node("Pad", ["c", "s"], ["m"], mode=random.choice(("constant", "reflect", "edge")))]
    elif kind == "Tile":
        constant = [array("s", [1, 1, size, size], np.int64)]
        middle = [helper.make_node("Tile", ["c", "s"], ["m"])]
    elif kind == "Expand":
        constant = [array("s", [1, 4, size, 8], np.int64), array("one", np.ones((1, 4, 1, 1)))]
        middle = [helper.make_node("Expand", ["one", "s"], ["e"]), helper.make_node("Add", ["c", "e"], ["m"])]
    elif kind == "ConstantOfShape":
        constant = [array("s", [1, 4, size, random.choice((1, 8, size))], np.int64)]
        middle = [helper.make_node("ConstantOfShape", ["s"], ["e"]), helper.make_node("Add", ["c", "e"], ["m"])]
    elif kind == "Range":
        constant = [array("a", 0, np.int64), array("s", size, np.int64), array("d", random.choice((1, 0, -1)), np.int64)]
        middle = [
            helper.make_node("Range", ["a", "s", "d"], ["r"]),
            helper.make_node("ReduceMax", ["r"], ["e"], keepdims=0),
            helper.make_node("Cast", ["e"], ["g"], to=1),
            helper.make_node("Add", ["c", "g"], ["m"]),
        ]
    elif kind == "Conv":
        constant = [array("k", np.ones((4, 4, 1, 1)))]
        middle = [helper.make_node("Conv", ["c", "k"], ["m"], pads=[size] * 4, strides=[random.choice((1, size))] * 2)]
    elif kind == "ConvTranspose":
        constant = [array("k", np.ones((4, 4, 1, 1)))]
        middle = [helper.make_node("ConvTranspose", ["c", "k"], ["m"], strides=[size, size])]
    elif kind == "OneHot":
        constant = [array("i", [0, 1, 2], np.int64), array("d", size, np.int64), array("o", [0, 1])]
        middle = [
            helper.make_node("OneHot", ["i", "d", "o"], ["e"]),
            helper.make_node("ReduceMax", ["e"], ["g"], keepdims=0),
            helper.make_node("Add", ["c", "g"], ["m"]),
        ]
    elif kind == "MatMul":
        length = min(size, 2**20)
        constant = [array("a", np.ones((length, 1))), array("d", np.ones((1, length)))]
        middle = [
            helper.make_node("MatMul", ["a", "d"], ["e"]),
            helper.make_node("ReduceMax", ["e"], ["g"], keepdims=0),
            helper.make_node("Add", ["c", "g"], ["m"]),
        ]
    else:
        times = random.choice((2, 20, 50))  # doubled so often
        middle = [
            helper.make_node("Concat", [f"d{i}" if i else "c"] * 2, [f"d{i + 1}" if i < times - 1 else "m"], axis=2)
            for i in range(times)
        ]
    proto = small(random, middle=tuple(middle))
    proto.graph.initializer.extend(constant)
    return case(f"{kind} of {size} or {side}", random, folder, proto.SerializeToString())


@hostile("onnx")
def functions(random: Random, folder: Path) -> Case:
    """Functions that call themselves or one another, or ever two of the next."""
    kind = random.choice(("itself", "each other", "doubling", "missing", "valid"))
    depth = {"itself": 1, "each other": 2, "doubling": random.choice((3, 30, 60)), "missing": 1, "valid": 2}[kind]
    called = {"itself": [0], "each other": [1, 0], "missing": [7]}.get(kind) or [*range(1, depth), None]
    middle = helper.make_node("F0", ["c"], ["m"], domain="f")
    proto = small(random, middle=(middle,))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    for number, other in enumerate(called):
        domain = "" if other is None else "f"
        name = "Relu" if other is None else f"F{other}"
        nodes = [helper.make_node(name, ["i"], ["j"], domain=domain)]
        nodes += [helper.make_node(name, ["j"], ["o"], domain=domain)] if kind == "doubling" else []
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        proto.functions.append(
            helper.make_function("f", f"F{number}", ["i"], ["o" if kind == "doubling" else "j"], nodes, imports)
        )
    return case(f"functions that call {kind}", random, folder, proto.SerializeToString())


@hostile("onnx")
def branches(random: Random, folder: Path) -> Case:
    """If in If in If, or a loop around nothing."""
    depth = random.choice((1, 5, 20, 60, 200))
    condition = random.choice(("k", "c", "nowhere"))
    inner = helper.make_graph([helper.make_node("Relu", ["c"], ["z0"])], "g", [], [helper.make_tensor_value_info("z0", 1, None)])
    for level in range(depth):
        node = helper.make_node("If", [condition], [f"z{level + 1}"], then_branch=inner, else_branch=inner if depth < 8 else None)
        try:
            inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info(f"z{level + 1}", 1, None)])
        except DecodeError:  # deeper than any file can be
            break
    last = inner.node[0]
    last.output[0] = "m"
    if random.random() < 0.2:
        last.op_type = random.choice(("Loop", "Scan"))
    proto = small(random, middle=(last,))
    proto.graph.initializer.append(array("k", random.choice((True, False)), np.bool_))
    try:
        data = proto.SerializeToString()
    except ValueError:
        data = b""
    return case(f"{depth} branches on {condition}", random, folder, data)


@hostile("onnx")
def staying(random: Random, folder: Path) -> Case:
    """Operators that stay as they are, with sizes that nobody has, in front of layers and behind them."""
    size = random.choice((0, 1, 3, -1, 2**16, 2**31, 2**40, 2**62))
    tensors = {
        "size": np.array(size, np.int64),
        "sizes": np.array([random.choice((1, 4, size)) for _ in range(4)], np.int64),
        "flags": np.array([True, False, True, True]),
        "ends": np.array([0, 1], np.float32),
        "rois": np.array([[0, 0, random.choice((1, 1e30, -1)), 4]], np.float32),
        "of": np.array([random.choice((0, 7, 2**40))], np.int64),
        "near": np.array([[random.choice((0, -9, size))]], np.int64),
        "gates": np.ones((1, 16, 8), np.float32),
        "again": np.ones((1, 16, 4), np.float32),
    }
    domain = {"domain": random.choice(("", "com.microsoft"))}
    middle = random.choice(
        (
            [helper.make_node("ArgMax", ["c"], ["a"], axis=1), helper.make_node("OneHot", ["a", "size", "ends"], ["m"], axis=1)],
            [helper.make_node("RoiAlign", ["c", "rois", "of"], ["m"], output_height=size, output_width=2, sampling_ratio=size)],
            [helper.make_node("Compress", ["c", "flags"], ["m"], axis=1)],
            [helper.make_node("NonZero", ["c"], ["m"])],
            [helper.make_node("GatherND", ["c", "near"], ["m"])],
            [helper.make_node("ScatterND", ["c", "near", "c"], ["m"])],
            [helper.make_node("Squeeze", ["c"], ["s"]), helper.make_node("LSTM", ["s", "gates", "again"], ["h"], hidden_size=size),
             helper.make_node("Squeeze", ["h"], ["m"])],
            [helper.make_node("MaxPool", ["c"], ["p", "i"], kernel_shape=[2, 2]), helper.make_node("MaxUnpool", ["p", "i", "sizes"], ["m"], kernel_shape=[2, 2])],
            [helper.make_node("GridSample", ["c", "c"], ["m"], **domain)],
            [helper.make_node("CropAndResize", ["c", "rois", "of", "sizes"], ["m"], domain="com.microsoft")],
            [helper.make_node(random.choice(("Gelu", "FusedConv", "SkipLayerNormalization", "Inverse", "EPContext", "Tokenizer", "Sampling")), ["c", "w", "v"][: random.randrange(1, 4)], ["m"], domain="com.microsoft")],
            [helper.make_node("CenterCropPad", ["c", "sizes"], ["m"])],
            [helper.make_node("Range", ["size", "size", "size"], ["r"]), helper.make_node("Cast", ["r"], ["m"], to=1)],
            [helper.make_node("SequenceConstruct", ["c", "c"], ["q"]), helper.make_node("ConcatFromSequence", ["q"], ["m"], axis=1)],
        )
    )  # fmt: skip
    proto = small(random, middle=tuple(middle))
    proto.graph.initializer.extend(array(name, values, values.dtype) for name, values in tensors.items())
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    if random.random() < 0.4:
        proto.graph.output.append(helper.make_value_info("m", onnx.TypeProto()))
    return case(f"{middle[-1].op_type} of {size}", random, folder, proto.SerializeToString())


@hostile("onnx")
def external(random: Random, folder: Path) -> Case:
    """Weights that are said to be elsewhere."""
    proto = valid(random)
    tensor = random.choice(proto.graph.initializer)
    places = (
        "/etc/passwd",
        "../../../../etc/passwd",
        "none.bin",
        "/dev/zero",
        "/dev/stdin",
        "",
        ".",
        "w.bin",
        "sparse.bin",
        "a\x00b",
        "model.onnx",
        "link",
    )
    location = random.choice(places)
    (folder / "w.bin").write_bytes(bytes(100))
    with (folder / "sparse.bin").open("wb") as file:
        file.truncate(2**37)
    (folder / "link").symlink_to("/etc/hostname")
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if random.random() < 0.7:
        tensor.external_data.add(key="length", value=random.choice(("0", "10", "-1", str(2**40), "many", "")))
    if random.random() < 0.3:
        tensor.external_data.add(key="offset", value=random.choice(("1", "-5", str(2**62), "nan")))
    if random.random() < 0.3:
        tensor.dims[:] = [random.choice(SIZES) for _ in range(2)]
    return case(f"external data in {location!r}", random, folder, proto.SerializeToString())


@hostile("onnx")
def large_images(random: Random, folder: Path) -> Case:
    sizes = [
        random.choice(("n", 1, 2**20, 2**40, 0, -1)),
        random.choice((3, 3, 2**20, 0)),
        *(random.choice((8, 2**12, 2**17, 2**31, 2**62, 0, "h")) for _ in range(2)),
    ]
    return case(f"images {sizes}", random, folder, small(random, shape=tuple(sizes)).SerializeToString())


# ---- changes


def any_node(random: Random, proto: onnx.ModelProto) -> onnx.NodeProto:
    return random.choice(proto.graph.node)


@change
def a_type(random: Random, proto: onnx.ModelProto) -> None:
    entry = random.choice((*proto.graph.input, *proto.graph.output, *proto.graph.value_info))
    entry.type.tensor_type.elem_type = random.choice(TYPES)


@change
def a_weight_type(random: Random, proto: onnx.ModelProto) -> None:
    random.choice(proto.graph.initializer).data_type = random.choice(TYPES)


@change
def a_weight_size(random: Random, proto: onnx.ModelProto) -> None:
    tensor = random.choice(proto.graph.initializer)
    if random.random() < 0.5:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(SIZES)
    else:
        tensor.dims[:] = [random.choice(SIZES) for _ in range(random.randrange(6))]


@change
def an_empty_weight(random: Random, proto: onnx.ModelProto) -> None:
    tensor = random.choice(proto.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.dims[:] = [random.choice((0, 1, 2**33, 2**40)) for _ in range(random.randrange(4))]


@change
def a_weight_of_another_field(random: Random, proto: onnx.ModelProto) -> None:
    tensor = random.choice(proto.graph.initializer)
    if random.random() < 0.5:
        tensor.ClearField("raw_data")
    field = random.choice(("float_data", "int32_data", "int64_data", "double_data", "string_data"))
    getattr(tensor, field).extend([b"a"] * 3 if field == "string_data" else [1] * 3)


@change
def a_sparse_weight(random: Random, proto: onnx.ModelProto) -> None:
    sparse = proto.graph.sparse_initializer.add()
    name = random.choice(("extra", "w", "v"))
    sparse.values.CopyFrom(array(name, [1.0]))
    sparse.indices.CopyFrom(array("i", [random.choice((0, 5, 2**40, -1))], np.int64))
    sparse.dims[:] = [random.choice((4, 2**20, 2**33, 2**62)) for _ in range(random.choice((1, 2, 4)))]
    kept = [tensor for tensor in proto.graph.initializer if tensor.name != name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


@change
def numbers(random: Random, proto: onnx.ModelProto) -> None:
    tensor = random.choice(proto.graph.initializer)
    values = numpy_helper.to_array(tensor).copy()
    for _ in range(random.choice((1, 3, 10**4))):
        values.flat[random.randrange(values.size)] = random.choice(FLOATS)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@change
def an_image_size(random: Random, proto: onnx.ModelProto) -> None:
    shape = random.choice((*proto.graph.input, *proto.graph.output)).type.tensor_type.shape
    if not shape.dim or random.random() < 0.2:
        shape.dim.add()
    dim = random.choice(shape.dim)
    dim.Clear()
    if random.random() < 0.7:
        dim.dim_value = random.choice(SIZES)
    else:
        dim.dim_param = random.choice(NAMES)


@change
def a_name(random: Random, proto: onnx.ModelProto) -> None:
    """One value renamed everywhere, or in one place only."""
    graph, new = proto.graph, random.choice(NAMES)
    old = random.choice([name for node in graph.node for name in (*node.input, *node.output)])
    everywhere = random.random() < 0.6
    for entry in (*graph.input, *graph.output, *graph.initializer):
        if entry.name == old:
            entry.name = new
            if not everywhere:
                return
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
                    if not everywhere:
                        return


@change
def a_node_name(random: Random, proto: onnx.ModelProto) -> None:
    any_node(random, proto).name = random.choice(NAMES)


@change
def a_wire(random: Random, proto: onnx.ModelProto) -> None:
    """An input of a node from elsewhere: cycles, nothing, weights, the node itself."""
    node = any_node(random, proto)
    names = [name for other in proto.graph.node for name in (*other.input, *other.output)]
    node.input[random.randrange(len(node.input))] = random.choice([*names, "nowhere", "", *node.output])


@change
def an_input_more_or_less(random: Random, proto: onnx.ModelProto) -> None:
    node = any_node(random, proto)
    if random.random() < 0.5:
        del node.input[random.randrange(len(node.input))]
    else:
        node.input.append(random.choice([*node.input, "x", "w", ""]))


@change
def an_output_more_or_less(random: Random, proto: onnx.ModelProto) -> None:
    node = any_node(random, proto)
    if random.random() < 0.3:
        del node.output[:]
    else:
        node.output.append(random.choice(["extra", "", *node.output, "x"]))


@change
def a_node_less(random: Random, proto: onnx.ModelProto) -> None:
    del proto.graph.node[random.randrange(len(proto.graph.node))]


@change
def a_node_twice(random: Random, proto: onnx.ModelProto) -> None:
    proto.graph.node.append(any_node(random, proto))


@change
def nodes_shuffled(random: Random, proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    random.shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


@change
def no_nodes(random: Random, proto: onnx.ModelProto) -> None:
    del proto.graph.node[:]
    if random.random() < 0.5:
        proto.graph.output[0].name = random.choice((proto.graph.input[0].name, proto.graph.initializer[0].name))


@change
def a_lost_part(random: Random, proto: onnx.ModelProto) -> None:
    proto.graph.ClearField(random.choice(("input", "output", "initializer", "name")))


@change
def an_output_that_is_none(random: Random, proto: onnx.ModelProto) -> None:
    """An output that is an input, a weight, there twice or nowhere."""
    names = [proto.graph.input[0].name, proto.graph.initializer[0].name, proto.graph.output[0].name, "nowhere", "c", "m"]
    entry = proto.graph.output.add()
    entry.CopyFrom(helper.make_tensor_value_info(random.choice(names), random.choice((1, 1, 1, 7, 0)), None))
    if random.random() < 0.4:
        del proto.graph.output[0]


@change
def another_input(random: Random, proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info(random.choice(("z", "x", "w", "c")), random.choice((1, 7)), [1, 2]))


@change
def an_input_of_no_tensor(random: Random, proto: onnx.ModelProto) -> None:
    entry = random.choice((proto.graph.input[0], proto.graph.output[0]))
    kind = random.choice(("sequence", "optional", "nothing", "map"))
    entry.ClearField("type")
    if kind == "sequence":
        entry.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == "optional":
        entry.type.optional_type.elem_type.tensor_type.elem_type = 1
    elif kind == "map":
        entry.type.map_type.key_type = 7


@change
def a_weight_twice(random: Random, proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(random.choice(proto.graph.initializer))


@change
def a_weight_less(random: Random, proto: onnx.ModelProto) -> None:
    del proto.graph.initializer[random.randrange(len(proto.graph.initializer))]


@change
def an_opset(random: Random, proto: onnx.ModelProto) -> None:
    version = random.choice((0, -1, 1, 6, 11, 12, 13, 22, 25, 99, 10**9, 2**63 - 1))
    if random.random() < 0.3:
        proto.opset_import.append(helper.make_opsetid(random.choice(("", "x", "ai.onnx.ml", "com.microsoft")), version))
    elif random.random() < 0.2:
        del proto.opset_import[:]
    else:
        proto.opset_import[0].version = version


@change
def a_version(random: Random, proto: onnx.ModelProto) -> None:
    proto.ir_version = random.choice((0, -1, 1, 3, 13, 99, 2**63 - 1))


@change
def an_operator(random: Random, proto: onnx.ModelProto) -> None:
    any_node(random, proto).op_type = random.choice(OPERATORS) if random.random() < 0.8 else random.choice(NAMES)


@change
def a_domain(random: Random, proto: onnx.ModelProto) -> None:
    any_node(random, proto).domain = random.choice(("ai.onnx", "com.microsoft", "ai.onnx.ml", "nowhere", *NAMES))


@change
def an_operator_between(random: Random, proto: onnx.ModelProto) -> None:
    """Any operator, with any attributes, between two nodes or on constants."""
    graph = proto.graph
    place = random.randrange(len(graph.node))
    name, node = random.choice(OPERATORS), graph.node[place]
    old = node.input[0]
    new = f"between{random.randrange(10**6)}"
    given = [old, *(random.choice([*[t.name for t in graph.initializer], old]) for _ in range(random.randrange(3)))]
    if random.random() < 0.3:
        given[0] = random.choice(graph.initializer).name
    added = helper.make_node(name, given, [new])
    for attribute in ATTRIBUTES.get(name, []):
        if random.random() < 0.6:
            put(random, added, attribute)
    node.input[0] = new
    graph.node.insert(place, added)


@change
def an_attribute(random: Random, proto: onnx.ModelProto) -> None:
    node = any_node(random, proto)
    known = [attribute.name for attribute in node.attribute] + ATTRIBUTES.get(node.op_type, []) + ["value", "none"]
    name = random.choice(known)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    put(random, node, name)


def put(random: Random, node: onnx.NodeProto, name: str) -> None:
    """An attribute with a value of any kind."""
    made = random.choice(
        (
            lambda: random.choice((0, 1, -1, 2, 3, *SIZES)),
            lambda: random.choice(FLOATS),
            lambda: random.choice(("", "SAME_UPPER", "VALID", "constant", "linear", "x", "\x00", "é")),
            lambda: [random.choice((0, 1, 2, 3, -1, *SIZES)) for _ in range(random.randrange(1, 9))],
            lambda: [random.choice((0, 1, 2, 3)) for _ in range(random.choice((1, 2, 4)))],
            lambda: [random.choice(FLOATS) for _ in range(3)],
            lambda: ["a", "b"],
            lambda: array("t", [1.0, 2.0]),
            lambda: array("t", random.choice(SIZES[:6]), np.int64),
            lambda: b"\xff\xfe",
        )
    )()
    attribute = helper.make_attribute(name, made)
    if random.random() < 0.1:
        attribute.type = random.choice(range(12))
    node.attribute.append(attribute)


@change
def a_constant(random: Random, proto: onnx.ModelProto) -> None:
    """A weight from a Constant node, told in one of the ways that there are, or in none."""
    tensor = random.choice(proto.graph.initializer)
    node = helper.make_node("Constant", [], [tensor.name])
    kind = random.choice(("nothing", "value", "value_float", "value_ints", "value_string", "sparse_value", "two", "lying"))
    if kind in ("value", "two"):
        node.attribute.append(helper.make_attribute("value", tensor))
    if kind in ("value_float", "two"):
        node.attribute.append(helper.make_attribute("value_float", 1.0))
    if kind == "value_ints":
        node.attribute.append(helper.make_attribute("value_ints", [1, 2]))
    if kind == "value_string":
        node.attribute.append(helper.make_attribute("value_string", b"\xff"))
    if kind == "sparse_value":
        sparse = onnx.SparseTensorProto(values=array("v", [1.0]), indices=array("i", [0], np.int64), dims=[2**20, 2**20])
        node.attribute.append(helper.make_attribute("sparse_value", sparse))
    if kind == "lying":
        node.attribute.append(helper.make_attribute("value", TensorProto(data_type=1, dims=[2**40, 2**20])))
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, node)


@change
def many_nodes(random: Random, proto: onnx.ModelProto) -> None:
    count = random.choice((500, 3000))
    node = proto.graph.node[-1]
    first, name = node.input[0], random.choice(("Identity", "Relu", "Neg", "Sigmoid"))
    nodes = [helper.make_node(name, [f"i{n}" if n else first], [f"i{n + 1}"]) for n in range(count)]
    node.input[0] = f"i{count}"
    kept = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*kept[:-1], *nodes, kept[-1]])


@change
def a_stored_normalisation(random: Random, proto: onnx.ModelProto) -> None:
    values = ("nan", "", "1,2,3", "x", ",", "0", "-1", "inf", "1e400", "0." + "1" * 10000, "٣", ",".join(["0.5"] * 10**5))
    del proto.metadata_props[:]
    for key in ("mean", "std"):
        if random.random() < 0.8:
            proto.metadata_props.add(key=f"dreamquant.{key}", value=random.choice(values))


@change
def a_note(random: Random, proto: onnx.ModelProto) -> None:
    note = random.choice((proto, proto.graph, any_node(random, proto)))
    note.doc_string = random.choice(NAMES)
    proto.metadata_props.add(key=random.choice(NAMES), value=random.choice(NAMES))


OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain and not schema.deprecated})
ATTRIBUTES = {schema.name: sorted(schema.attributes) for schema in onnx.defs.get_all_schemas() if not schema.domain}
