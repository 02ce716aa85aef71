"""What each layer of a file costs in ONNX Runtime beside the same layer of the float file.

The runtime tells the time of every node that it runs, but merges nodes, renames them and puts others in between. So a copy of the
file is run in which nodes and values are named after the node's place, and the runtime's own graph, which it writes when it is
asked to, says what became of them. A node belongs to the last layer with weights whose values it computes with, which is the
same in both files however they are cut up.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from torch import fx

from dreamquant.network.graph import Network
from dreamquant.network.notes import notes
from dreamquant.network.operators import WEIGHTED, data_inputs, data_nodes, is_call
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner, refusals, session_options

RUNS = 10  # the median of which is told
FRONT = ""  # what computes with no layer's values
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger")  # how the runtime's integer kernels are called
MARK = re.compile(r"dq(\d+)x")


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer and all that is computed with its values up to the next, in the float file and in the other.

    `in_float`: whether no integer kernel has any part in that.
    """

    layer: str
    float_ms: float
    ms: float
    in_float: bool

    def __str__(self) -> str:
        how = ", in float" if self.in_float else ""
        return f"{self.layer or 'what is before the first layer'} {self.ms:.2f} ms (float file {self.float_ms:.2f} ms{how})"


def layer_times(network: Network, student: Student, reference: Path, path: Path, values: Mapping[str, str]) -> list[LayerTime]:
    """Times of the layers on one thread on normal noise, those first that take longest beyond what they take in the float file.

    `reference` is the network's float file (`assess.float_file`), `path` that of its student, which calls the student's tensors
    as `values` has it. Nodes of no layer, as of what stays behind the network, are left out. Raises `ModelError` where the
    runtime refuses a file.
    """
    origins = {origin: node.name for node in network.graph.graph.nodes if (origin := notes(node).origin) is not None}
    found = [
        _times(path, network, layers_of(graph), values)
        for path, graph, values in (
            (reference, network.graph.graph, origins),
            (path, student.network.graph.graph, {value: node for node, value in values.items()}),
        )
    ]
    before, after = found
    times = [
        LayerTime(layer, sum(ms for _, ms in before[layer]), sum(ms for _, ms in after[layer]), _in_float(after[layer]))
        for layer in after
        if layer in before
    ]
    return sorted(times, key=lambda one: one.float_ms - one.ms)


def layers_of(graph: fx.Graph) -> dict[str, str]:
    """By the names of tensors, the last layer with weights that has part in their values; `FRONT` where none has."""
    found: dict[str, str] = {}
    order: dict[str, int] = {FRONT: 0}
    for node in data_nodes(graph):
        if is_call(node, WEIGHTED):
            order[node.name] = len(order)
            found[node.name] = node.name
        else:
            found[node.name] = max(
                (found.get(one.name, FRONT) for one in data_inputs(node)), key=order.__getitem__, default=FRONT
            )
    return found


def _in_float(nodes: Iterable[tuple[str, float]]) -> bool:
    return not any(operator.startswith(INTEGER) for operator, _ in nodes)


def _times(
    path: Path, network: Network, layers: Mapping[str, str], values: Mapping[str, str]
) -> dict[str, list[tuple[str, float]]]:
    """By layer, operators and milliseconds of the nodes that the runtime makes of a file; `values` are the graph's tensors by the
    file's names."""
    proto = onnx.load(path)
    owners = _owners(proto, {value: layers[node] for value, node in values.items() if node in layers})
    runner = onnx_runner(path, threads=1, layout=network.space.layout)
    noise = np.random.default_rng(0).standard_normal((network.batch or runner.batch or 1, *network.input_shape), np.float32)
    found: dict[str, list[tuple[str, float]]] = {}
    for mark, operator, ms in _profile(_marked(proto), path.name, runner.input_name, runner.fed(noise)):
        if mark in owners:
            found.setdefault(owners[mark], []).append((operator, ms))
    return found


def _owners(proto: onnx.ModelProto, known: Mapping[str, str]) -> dict[int, str]:
    """The layer of each node by its place: that of the value it gives or, where that has no name, of whoever reads it."""
    reads: dict[str, str] = {}
    owners = {}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        owner = next((named[value] for value in node.output for named in (known, reads) if value in named), None)
        if owner is not None:
            owners[place] = owner
            reads |= dict.fromkeys(node.input, owner)
    return owners


def _marked(proto: onnx.ModelProto) -> bytes:
    """The model with every node and every computed value named after the node's place."""
    marked = onnx.ModelProto()
    marked.CopyFrom(proto)
    del marked.graph.value_info[:]
    names: dict[str, str] = {}
    for place, node in enumerate(marked.graph.node):
        node.name = f"dq{place}x"
        names |= {name: f"dq{place}x{index}" for index, name in enumerate(node.output) if name}
    _rename(marked.graph, names)
    model: bytes = marked.SerializeToString()
    return model


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for output in graph.output:
        output.name = names.get(output.name, output.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)


def _profile(model: bytes, name: str, given: str, images: NDArray[Any]) -> list[tuple[int, str, float]]:
    """Of each node that the runtime runs: the place in a marked model of what it comes of, its operator, and milliseconds."""
    with tempfile.TemporaryDirectory() as folder, refusals(f"{name} does not run under ONNX Runtime's profiler"):
        options = session_options()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "times")
        options.optimized_model_filepath = str(Path(folder) / "run.onnx")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, {given: images})
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = {node.name: node for node in onnx.load(options.optimized_model_filepath).graph.node}
    durations: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
    found = []
    for called, times in durations.items():
        node = nodes.get(called)
        mark = None if node is None else next(filter(None, map(MARK.search, (node.name, *node.output, *node.input))), None)
        if node is not None and mark is not None:
            found.append((int(mark[1]), node.op_type, float(np.median(times))))
    return found
