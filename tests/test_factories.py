"""No tensor is made without saying where: a stage's tensors lie where its network does."""

from __future__ import annotations

import ast
from pathlib import Path

import dreamquant

SOURCE = Path(dreamquant.__file__).parent
FACTORIES = {"arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "tensor"}
FACTORIES |= {"tril_indices", "triu_indices", "zeros", "frombuffer", "from_numpy", "from_file", "hann_window", "cartesian_prod"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
# what lies in the processor's memory by its nature: files that are read and written, what is looked at before a network is moved
# to its device, measurements of files, and images that are made or kept there
AT_HOME = [
    "assess",
    "calibration.py",
    "cli",
    "conformity",
    "exporters",
    "mapped.py",
    "network/archive.py",
    "network/batch.py",
    "network/capture.py",
    "network/input_evidence.py",
    "network/onnx_import",
    "network/opaque.py",
    "network/outputs.py",
    "network/scores.py",
    "real_images.py",
    "reconstruction/_store.py",
    "report",
    "storage.py",
]


def made(source: str) -> list[int]:
    """The lines where a tensor is made, and neither a device nor a generator of the processor says where."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        keywords = {keyword.arg for keyword in node.keywords}
        if not isinstance(owner, ast.Name) or owner.id != "torch" or "device" in keywords:
            continue
        if name in FACTORIES or (name in DRAWS and "generator" not in keywords):
            found.append(node.lineno)
    return found


def test_a_tensor_that_is_made_nowhere_is_found() -> None:
    assert made("x = torch.zeros(3)\ny = torch.zeros(3, device=x.device)\nz = torch.randn(2)") == [1, 3]
    assert made("torch.randn(2, generator=g)\ntorch.zeros_like(x)\nx.new_zeros(2)") == []


def test_every_tensor_of_a_stage_is_made_somewhere() -> None:
    places = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not any(name == home or name.startswith(f"{home}/") for home in AT_HOME):
            places += [f"{name}:{line}" for line in made(path.read_text())]

    assert places == []


def test_what_lies_at_home_is_there() -> None:
    assert [home for home in AT_HOME if not (SOURCE / home).exists()] == []
