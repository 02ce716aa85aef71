"""`Network`: the one inner representation, whatever file or module it came from.

The graph of a network is a flat `torch.fx.GraphModule` in eval mode with

- one input (`is_input`): the batch of images, float32 (N, C, H, W), in the input space of the network;
- `get_attr` nodes for parameters, buffers and constants, under flat names;
- `call_function` nodes whose targets are functional ATen overloads as `torch.export` gives them before decomposition
  (`aten.conv2d.default`, `aten.linear.default`, `aten.batch_norm.default`, ...), `operator.getitem`, and integer
  arithmetic on `aten.sym_size.int` where a shape depends on the batch;
- one `output`: a tensor or a tuple of tensors.

What is known of a node beside is in its `notes`: shape and number type of every tensor-valued one (measured on a batch of
two, or of `Network.batch`), and the name of the value that it stands for in the file that was read.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dreamquant.devices import CPU
from dreamquant.errors import ModelError
from dreamquant.mapped import Pieces, room
from dreamquant.network.input_space import UNKNOWN, InputSpace
from dreamquant.network.notes import is_tensor, notes, set_notes

if TYPE_CHECKING:
    import onnx

    from dreamquant.network.outputs import Output

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """Where a network came from: `kind` is "onnx", "pt2", "module" or "timm", `text` what the user gave, `trusted` whether it
    was read as a file that may run code.

    Of an ONNX file `proto` is the model, `ends` the names of the values that the network's graph gives, and `tail` what the file
    makes of these on the way to its outputs, None where they are its outputs.
    """

    kind: str
    text: str
    path: Path | None = None
    proto: onnx.ModelProto | None = field(default=None, repr=False, compare=False)
    ends: tuple[str, ...] = ()
    tail: onnx.ModelProto | None = field(default=None, repr=False, compare=False)
    trusted: bool = False


@dataclass(frozen=True)
class Network:
    """A trained network, ready to be dreamt with and quantized.

    `input_shape` is (C, H, W), `space` what numbers it is fed and how the file takes them; inside, images are always float32
    (N, C, H, W). `batch` is the only batch size the graph can run, None for any. `outputs` says of each output of the
    graph, in order, where its images lie and of what kind it is. `remarks` say what of it is not as it was, in sentences.
    """

    graph: fx.GraphModule
    input_shape: tuple[int, int, int]
    source: Source
    space: InputSpace = UNKNOWN
    batch: int | None = None
    outputs: tuple[Output, ...] = ()
    remarks: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """The first of the `answers`."""
        return self.answers(images)[0]

    def answers(self, images: Tensor) -> list[Tensor]:
        """All outputs on images (N, C, H, W), each (N, ...); a network bound to one batch size is run piece by piece."""
        return run_batched(self.graph, images, self.batch, self.outputs)

    def with_graph(self, graph: fx.GraphModule) -> Network:
        """The same network around another graph of the same function."""
        return replace(self, graph=graph)

    def rebuilt(self, graph: fx.GraphModule) -> Network:
        """The same network around a graph of other nodes, so that it cannot go out as the ONNX graph it came in as."""
        return replace(self, graph=graph, source=replace(self.source, proto=None))

    def to(self, device: torch.device) -> Network:
        """The same network with its tensors on a device, where all that runs it computes; one of no stored tensor stays."""
        return self if device == self.device else self.with_graph(moved(self.graph, device))

    @property
    def device(self) -> torch.device:
        """Where the network's tensors lie."""
        return device_of(self.graph)

    @property
    def input_name(self) -> str:
        """The name of the input in the ONNX file that the network was read from; empty where it came from elsewhere."""
        proto = self.source.proto
        if self.source.kind != "onnx" or proto is None:
            return (notes(input_node(self.graph.graph)).origin or "") if self.source.kind == "onnx" else ""
        stored = {tensor.name for tensor in proto.graph.initializer}
        return next((value.name for value in proto.graph.input if value.name not in stored), "")

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from pixels in 0..1, one number a channel; empty where that is not known."""
        return self.space.mean

    @property
    def std(self) -> tuple[float, ...]:
        """What they are then divided by."""
        return self.space.std

    @property
    def sees_photographs(self) -> bool:
        """Whether images are taken to be photographs: three channels, of known numbers that may be pixels."""
        return self.input_shape[0] == 3 and (bool(self.mean) or self.space.known == "measured")

    @property
    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, 1, 1) that images have in the input space, on the network's device."""
        mean, deviation = self.space.statistics(self.input_shape[0])
        return mean.to(self.device), deviation.to(self.device)


def device_of(graph: fx.GraphModule) -> torch.device:
    """Where the tensors lie that a graph has stored; the processor where it has none."""
    stored = next(itertools.chain(graph.parameters(), graph.buffers()), None)
    return CPU if stored is None else stored.device


def moved(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a graph whose tensors lie on a device, with those that it makes as it runs."""
    graph = copy.deepcopy(graph).to(device)

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), there)
        if _makes_tensors(node):
            node.update_kwarg("device", device)
        normal = notes(node).normal
        if normal is not None:
            set_notes(node, replace(notes(node), normal=(normal[0].to(device), normal[1].to(device))))
    graph.recompile()
    return graph


def _makes_tensors(node: fx.Node) -> bool:
    """Whether a node makes a tensor of none, where an argument says."""
    schema = getattr(node.target, "_schema", None)
    takes = schema is not None and any(argument.name == "device" for argument in schema.arguments)
    return takes and not any(map(is_tensor, node.all_input_nodes))


def run_batched(graph: fx.GraphModule, images: Tensor, batch: int | None, outputs: Sequence[Output] = ()) -> list[Tensor]:
    """All outputs of `graph` on `images`, each (N, ...) on its device, in pieces of `batch` where it runs no other size."""
    images = images.to(device_of(graph))
    pieces = [images] if batch is None else torch.split(whole_batches(images, batch), batch)
    found = [by_image(graph(piece), outputs, len(piece)) for piece in pieces]
    return [torch.cat(parts)[: len(images)] if len(parts) > 1 else parts[0][: len(images)] for parts in zip(*found, strict=True)]


def by_image(result: Any, outputs: Sequence[Output], count: int) -> list[Tensor]:
    """What a graph, or the file written from it, returned for `count` images: all outputs, each (N, ...).

    Where nothing is known of the outputs, the images lie in the first axis.
    """
    values = outputs_of(result)
    return [output.by_image(value, count) for output, value in zip(outputs, values, strict=True)] if outputs else values


def outputs_of(result: Any) -> list[Tensor]:
    """All outputs, of what a graph returns."""
    return list(result) if isinstance(result, tuple | list) else [result]


def run_once(graph: fx.GraphModule, images: Tensor) -> list[Tensor]:
    """All outputs of `graph` on `images`, as it returns them; without gradients."""
    with torch.no_grad():
        return outputs_of(graph(images.to(device_of(graph))))


def in_pieces(images: Tensor, batch: int | None, size: int, device: torch.device = CPU) -> Pieces:
    """The images as a graph on `device` is to be run on them: whole batches of `batch` where it runs no others, else `size` at
    once."""
    return Pieces(whole_batches(images, batch), batch or size, device)


def whole_batches(images: Tensor, batch: int | None) -> Tensor:
    """The images; where a graph can only run batches of `batch`, the last is filled up with copies of its first image."""
    surplus = 0 if batch is None else len(images) % batch
    if batch is None or surplus == 0:
        return images
    return torch.cat([images, images[-surplus, None].expand(batch - surplus, *images.shape[1:])])


def digest(tensors: Iterable[Tensor]) -> str:
    """A short text that tells tensors apart."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def is_input(node: fx.Node) -> bool:
    """Whether a node stands for what the graph is given."""
    return node.op == "placeholder"


def input_node(graph: fx.Graph) -> fx.Node:
    """The node of the input images."""
    found: fx.Node = next(filter(is_input, graph.nodes))
    return found


def output_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes that the graph returns."""
    result: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def needed_by(nodes: Iterable[fx.Node], given: Collection[fx.Node] = ()) -> set[fx.Node]:
    """These nodes and all that they are computed from, where `given` are known."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in given:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def joined(run: Callable[[Tensor], Sequence[Tensor]], pieces: Sequence[Tensor]) -> list[Tensor]:
    """What `run` gives on pieces of images, each tensor put together along its first axis, that of the images; without
    gradients."""
    count, start, found = sum(map(len, pieces)), 0, list[Tensor]()
    with torch.no_grad():
        for piece in pieces:
            values = run(piece)
            rows = [len(value) // max(len(piece), 1) for value in values]  # of an image
            found = found or [
                room((count * each, *value.shape[1:]), value.dtype) for each, value in zip(rows, values, strict=True)
            ]
            for whole, each, value in zip(found, rows, values, strict=True):
                whole[start * each : start * each + len(value)] = value
            start += len(piece)
    return found


def tensor_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise ModelError(f"{node.target} is a {type(value).__name__}, not a tensor")
    return value
