"""What a `.pt2` file holds is data: every way to hide code in one is refused, and what torch.export.save writes is read."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import ModelError
from dreamquant.network.archive import extra_files, read_archive
from dreamquant.network.load import load

PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
SHAPE = (3, 6, 5)


class Small(nn.Module):
    """A shared weight, an expanded buffer, a constant, a block without gradients, an operator in place, an odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second.weight = self.first.weight
        self.odd = nn.Sequential()
        self.odd.add_module("layer-1 of 1", nn.Conv2d(4, 4, 1))
        self.register_buffer("mask", torch.ones(1, 4, 1, 1).expand(2, 4, 1, 1)[:1])
        self.scale = torch.tensor(2.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.second(x)
        y = F.relu_(self.norm(self.first(x))) + other * self.mask * self.scale
        scores: Tensor = self.head(self.odd(y).flatten(2).mean(-1))
        return scores


def export(module: nn.Module, *, decompose: bool = False, **options: Any) -> torch.export.ExportedProgram:
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():  # torch's own, about itself
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (images,), **options)
        return program.run_decompositions() if decompose else program


@pytest.fixture(scope="module")
def dynamic() -> torch.export.ExportedProgram:
    return export(Small(), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


@pytest.fixture(scope="module")
def honest(dynamic: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "honest.pt2"
    torch.export.save(dynamic, path)
    return path


# ---- honest files


FORMS: dict[str, Callable[[], torch.export.ExportedProgram]] = {
    "one batch size": lambda: export(Small()),
    "any batch size": lambda: export(Small(), dynamic_shapes=({0: torch.export.Dim.AUTO},)),
    "a named batch size": lambda: export(Small(), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=9)},)),
    "decomposed": lambda: export(Small(), decompose=True, dynamic_shapes=({0: torch.export.Dim.AUTO},)),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("inputs", [True, False])
def test_what_torch_writes_is_read_as_torch_reads_it(form: str, inputs: bool, tmp_path: Path) -> None:
    program = FORMS[form]()
    if not inputs:
        program._example_inputs = None
    torch.export.save(program, tmp_path / "a.pt2", extra_files={"note": "seven"})
    mine, theirs = load(tmp_path / "a.pt2"), load(tmp_path / "a.pt2", trust=True)
    images = torch.randn(4, *SHAPE)

    assert str(mine.graph.graph) == str(theirs.graph.graph)
    assert mine.batch == theirs.batch
    assert torch.equal(mine(images), theirs(images))
    assert extra_files(tmp_path / "a.pt2") == {"note": "seven"}


def test_real_networks_are_read(data_dir: Path) -> None:
    files = [path for path in sorted(data_dir.glob("*/*.pt2")) if path.stat().st_size < 2e6]
    assert files
    for path in files:
        state = torch.export.load(path).state_dict
        assert all(torch.equal(value, state[name]) for name, value in read_archive(path).state_dict.items())


def test_tensors_that_shared_memory_share_it(honest: Path) -> None:
    state = read_archive(honest).state_dict
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert isinstance(state["first.weight"], nn.Parameter)


# ---- files with code in them


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


Members = dict[str, bytes]


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rewrite(members: Members, name: str, change: Callable[[Any], None]) -> None:
    fields = json.loads(members[name])
    change(fields)
    members[name] = json.dumps(fields).encode()


def on_program(change: Callable[[Any, Path], None]) -> Callable[[Members, Path], None]:
    return lambda members, mark: rewrite(members, PROGRAM, lambda fields: change(fields, mark))


def first_tensor(fields: Any) -> Any:
    return fields["graph_module"]["graph"]["tensor_values"][fields["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]]


def python(mark: Path) -> str:
    return f"__import__('pathlib').Path({str(mark)!r}).touch()"


def sample_inputs(members: Members, mark: Path) -> None:
    members[SAMPLES] = saved(((Payload(mark),), {}))


def pickled_weight(members: Members, mark: Path) -> None:
    def change(fields: Any) -> None:
        entry = fields["config"]["head.bias"]
        entry["use_pickle"], entry["path_name"] = True, "weight_99"

    rewrite(members, WEIGHTS, change)
    members["data/weights/weight_99"] = saved(Payload(mark))


def constant(prefix: str, data: Callable[[Path], bytes]) -> Callable[[Members, Path], None]:
    def change(members: Members, mark: Path) -> None:
        entry = {"path_name": f"{prefix}9", "is_param": False, "use_pickle": True, "tensor_meta": None}
        rewrite(members, CONSTANTS, lambda fields: fields["config"].update(hidden=entry))
        members[f"data/constants/{prefix}9"] = data(mark)

    return change


def older_weights(members: Members, mark: Path) -> None:
    members["data/weights/model.pt"] = saved({"head.bias": Payload(mark)})


def older_constants(members: Members, mark: Path) -> None:
    members["data/constants/model.pt"] = saved({"c": Payload(mark)})


def size_of_a_tensor(fields: Any, mark: Path) -> None:
    first_tensor(fields)["sizes"][0] = {"as_expr": {"expr_str": python(mark), "hint": None}}


def hidden_in_a_sum(fields: Any, mark: Path) -> None:
    text = f"Add(Symbol('s77', positive=True, integer=True), Integer(0) if {python(mark)} else Integer(0))"
    first_tensor(fields)["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}


def keyword_of_a_symbol(fields: Any, mark: Path) -> None:
    text = f"Symbol('s77', positive={python(mark)} is None, integer=True)"
    first_tensor(fields)["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}


def symbolic_value(fields: Any, mark: Path) -> None:
    graph = fields["graph_module"]["graph"]
    graph["sym_int_values"]["sym"] = {"as_expr": {"expr_str": python(mark), "hint": None}}
    node = {
        "target": "_operator.add",
        "inputs": [],
        "outputs": [{"as_sym_int": {"as_name": "sym"}}],
        "metadata": {},
        "name": "sym",
    }
    node["inputs"] = [{"name": name, "arg": {"as_int": 1}, "kind": 1} for name in "ab"]
    graph["nodes"].insert(0, node)


def call(target: str, *arguments: Any) -> Callable[[Any, Path], None]:
    """A node that calls something in torch; MARK stands for the file to be made."""

    def change(fields: Any, mark: Path) -> None:
        inputs = [{"name": "", "arg": {"as_string": str(mark)} if a == "MARK" else a, "kind": 1} for a in arguments]
        node = {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": "hidden"}
        fields["graph_module"]["graph"]["nodes"].insert(0, node)

    return change


def mapped_file(fields: Any, mark: Path) -> None:
    graph = fields["graph_module"]["graph"]
    values = {"filename": {"as_string": str(mark)}, "shared": {"as_bool": True}, "size": {"as_int": 1}}
    inputs = [{"name": name, "arg": value, "kind": 1} for name, value in values.items()]
    graph["tensor_values"]["mapped"] = first_tensor(fields)
    node = {"target": "torch.ops.aten.from_file.default", "inputs": inputs, "metadata": {}, "name": "mapped"}
    graph["nodes"].insert(0, node | {"outputs": [{"as_tensor": {"name": "mapped"}}]})


def function_as_argument(fields: Any, mark: Path) -> None:
    fields["graph_module"]["graph"]["nodes"][0]["inputs"].append(
        {"name": "bias", "arg": {"as_operator": "torch.hub.sys"}, "kind": 2}
    )


def rename(fields: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(fields).replace(json.dumps(old), json.dumps(new)))


def name_of_the_input(fields: Any, mark: Path) -> None:
    old = fields["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]
    fields.update(rename(fields, old, f"{old}={python(mark)}"))


def name_of_a_node(fields: Any, mark: Path) -> None:
    old = next(node["name"] for node in fields["graph_module"]["graph"]["nodes"] if "conv2d" in node["target"])
    fields.update(rename(fields, old, f"a = {python(mark)}; {old}"))


def name_of_a_weight(fields: Any, mark: Path) -> None:
    fields.update(rename(fields, "head.bias", f'head.bias") or {python(mark)} or getattr(self, "x'))


def class_of_a_module(fields: Any, mark: Path) -> None:
    fields.update(rename(fields, "head.bias", "__class__.forward"))


def guard(fields: Any, mark: Path) -> None:
    fields["guards_code"] = [python(mark)]


def imported(fields: Any, mark: Path) -> None:
    (mark.parent / "hostile_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    signature = next(entry["signature"] for entry in fields["graph_module"]["module_call_graph"] if entry["fqn"] == "")
    version, tree = json.loads(signature["in_spec"])
    tree["children_spec"][1]["context"] = json.dumps([{"__enum__": True, "fqn": "hostile_module:X", "name": "x"}])
    signature["in_spec"] = json.dumps([version, tree])


# what torch's own reader runs: with the flag each of these makes the file
RUN = {
    "sample inputs": sample_inputs,
    "weight": pickled_weight,
    "constant": constant("tensor_", lambda mark: saved(Payload(mark))),
    "opaque object": constant("opaque_obj_", lambda mark: pickle.dumps(Payload(mark))),
    "older weights": older_weights,
    "older constants": older_constants,
    "size": on_program(size_of_a_tensor),
    "size, hidden in a sum": on_program(hidden_in_a_sum),
    "size, keyword of a symbol": on_program(keyword_of_a_symbol),
    "symbolic value": on_program(symbolic_value),
    "name of the input": on_program(name_of_the_input),
    "imported module": on_program(imported),
}
# what is refused with them: torch does not get so far, or only other versions of it do
ALSO = {
    "name of a node": on_program(name_of_a_node),
    "function of torch": on_program(call("torch.hub.os.mkdir", "MARK")),
    "file that an operator maps": on_program(mapped_file),
    "custom object": constant("custom_obj_", lambda _: b"PK"),
    "operator that saves": on_program(call("torch.ops.aten.save.default", "MARK")),
    "operator of another library": on_program(call("torch.ops.prims.sin.default")),
    "class of a library": on_program(call("torch.classes.load_library", "MARK")),
    "method of an operator": on_program(call("torch.ops.aten.relu.__class__", "MARK")),
    "attribute getter": on_program(call("_operator.methodcaller", "MARK")),
    "extension": on_program(call("#x:y")),
    "function as an argument": on_program(function_as_argument),
    "name of a weight": on_program(name_of_a_weight),
    "class of a module": on_program(class_of_a_module),
    "compiled kernel": on_program(call("torch.ops.higher_order.triton_kernel_wrapper_functional")),
}


def hostile(honest: Path, change: Callable[[Members, Path], None], folder: Path) -> tuple[Path, Path]:
    with zipfile.ZipFile(honest) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    mark = folder / "mark"
    change(members, mark)
    path = folder / "hostile.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path, mark


@pytest.mark.parametrize("name", [*RUN, *ALSO])
def test_code_is_refused_and_not_run(name: str, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path, mark = hostile(honest, {**RUN, **ALSO}[name], tmp_path)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    assert "torch would run code from it" in str(caught.value)
    assert "--trust-model" in str(caught.value)


@pytest.mark.parametrize("name", list(RUN))
def test_the_code_is_code(name: str, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path, mark = hostile(honest, RUN[name], tmp_path)
    with contextlib.suppress(Exception):  # after it has run
        load(path, trust=True)
    try:
        assert mark.exists()
    finally:
        sys.modules.pop("hostile_module", None)
        torch._export.serde.serialize._CURRENT_DESERIALIZER = None


def test_guards_and_compiled_code_are_left_out(honest: Path, tmp_path: Path) -> None:
    def change(members: Members, mark: Path) -> None:
        rewrite(members, PROGRAM, lambda fields: guard(fields, mark))
        members["data/aotinductor/model/model.so"] = b"\x7fELF"
        members["models/another.json"] = b"{}"

    path, mark = hostile(honest, change, tmp_path)
    images = torch.randn(2, *SHAPE)
    assert torch.equal(load(path)(images), load(honest)(images))
    assert not mark.exists()


class Photographs(Tensor):
    """A tensor of a class of its own, which torch pickles."""


def test_an_honest_file_that_is_pickled_needs_trust(tmp_path: Path) -> None:
    program = export(Small())
    program._example_inputs = ((torch.zeros(2, *SHAPE).as_subclass(Photographs),), {})
    torch.export.save(program, tmp_path / "own.pt2")
    with pytest.raises(ModelError, match="example inputs are not tensors alone.*--trust-model"):
        load(tmp_path / "own.pt2")
    assert load(tmp_path / "own.pt2", trust=True).input_shape == SHAPE


def test_the_command_line(tmp_path: Path, command: Callable[..., Any]) -> None:
    program = export(Small())
    program._example_inputs = ((torch.zeros(2, *SHAPE).as_subclass(Photographs),), {})
    torch.export.save(program, tmp_path / "own.pt2")
    refused = command("inspect", tmp_path / "own.pt2")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "--trust-model" in refused.err
    assert command("inspect", tmp_path / "own.pt2", "--trust-model").status == 0


# ---- containers, sizes and fields that are not what they seem


def test_sizes_that_would_take_all_memory_or_time(honest: Path, tmp_path: Path) -> None:
    def empty_weight(members: Members, mark: Path) -> None:
        rewrite(members, WEIGHTS, lambda fields: fields["config"]["head.bias"]["tensor_meta"].update(sizes=[{"as_int": 2**40}]))
        members["data/weights/" + json.loads(members[WEIGHTS])["config"]["head.bias"]["path_name"]] = b""

    def expanded_weight(members: Members, mark: Path) -> None:
        meta = {"sizes": [{"as_int": 2**40}], "strides": [{"as_int": 0}]}
        rewrite(members, WEIGHTS, lambda fields: fields["config"]["head.bias"]["tensor_meta"].update(meta))

    def power(members: Members, mark: Path) -> None:
        text = "Pow(Integer(9), Pow(Integer(9), Integer(99)))"
        change = {"as_expr": {"expr_str": text, "hint": None}}
        rewrite(members, PROGRAM, lambda fields: first_tensor(fields)["sizes"].__setitem__(0, change))

    def counted_symbols(members: Members, mark: Path) -> None:
        ranges = {"u99999999999": {"min_val": 0, "max_val": 1}}
        rewrite(members, PROGRAM, lambda fields: fields["range_constraints"].update(ranges))

    for change in (empty_weight, expanded_weight, power, counted_symbols):
        with pytest.raises(ModelError) as caught:
            load(hostile(honest, change, tmp_path)[0])
        assert "\n" not in str(caught.value)


def test_archives_that_are_no_plain_ones(honest: Path, tmp_path: Path) -> None:
    def write(**options: Any) -> Path:
        path = tmp_path / "given.pt2"
        with zipfile.ZipFile(path, "w", **options) as archive, zipfile.ZipFile(honest) as source:
            for name in source.namelist():
                archive.writestr(name, source.read(name))
        return path

    def refused(path: Path, text: str) -> None:
        with pytest.raises(ModelError, match=text) as caught:
            load(path)
        assert "\n" not in str(caught.value)

    refused(write(compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    for name in ("../evil", "/etc/evil", "archive/../../evil", "archive\\evil", "archive//evil", "archive/e\nvil"):
        path = write()
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        refused(path, "no plain path")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path := write(), "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    refused(path, "several members of one name")
    data = bytearray(write().read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last member says that it is larger than the whole file
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    refused(path, "more than the file's")


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(11), Symbol('s77', positive=True, integer=True))",
        "Add(Integer(-1), FloorDiv(Symbol('s77', positive=True, integer=True), Integer(2)))",
        "Pow(Symbol('s77', positive=True, integer=True), Integer(2))",
        "Max(Integer(1), Symbol('u0', integer=True))",
        "Float('0.5', precision=53)",
        "Equality(Symbol('s0'), Integer(2))",
    ],
)
def test_sizes_that_are_expressions(text: str) -> None:
    from dreamquant.network.archive_texts import expression

    assert expression(text, "a size") == text
