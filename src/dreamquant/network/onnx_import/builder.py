"""The graph under construction: ONNX values by name, constants known at import, and one node's view of both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import onnx
import torch
from onnx import helper
from torch import fx, nn

from dreamquant.errors import ModelError, UnsupportedOperator
from dreamquant.limits import check_memory
from dreamquant.network.notes import Notes, note_value, notes, set_notes

Array = np.ndarray[Any, Any]
FLOAT_BYTES = 4

REFUSED_DTYPES = ("float16", "bfloat16", "float64")
FLOAT32_ONLY = "only float32 networks are read; convert the file to float32 first"


class Computed(UnsupportedOperator):
    """What a node needs to know, as sizes, depends on the images."""


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the images: `array`, under the file's `name` for it.

    `base` is set where the array is another one broadcast: the graph then stores the small one and expands it.
    """

    name: str
    array: Array
    base: Known | None = None


class Builder:
    """An fx graph that grows node by node, each run on the meta device as it is added so that its shape is known."""

    def __init__(self, model: str, opset: int) -> None:
        self.model = model
        self.opset = opset
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[str, fx.Node | Known] = {}
        self.tail: list[onnx.NodeProto] = []  # nodes that are left behind
        self.behind: set[str] = set()  # what they compute
        self.reasons: dict[str, str] = {}  # by the first output of a node why it, and not only what it reads, is left behind
        self.staying: set[str] = set()  # values of operators without a counterpart
        self.branches: dict[str, str] = {}  # of each If, by its first output, the attribute of the branch that it takes
        self._fake: dict[fx.Node, Any] = {}
        self._stored: dict[tuple[str, bool], fx.Node] = {}
        self._known_bytes = 0

    def images(self, name: str, shape: tuple[int, ...]) -> None:
        """Add the input of images of `shape` (N, C, H, W), the graph input `name`."""
        node = self.graph.placeholder(_identifier(name))
        set_notes(node, Notes(origin=name))
        check_memory(math.prod(shape) * FLOAT_BYTES, f"{self.model}: images {shape}", ModelError)
        self.values[name] = self._with_value(node, torch.empty(shape, device="meta"))

    def call(self, target: Any, *args: Any, title: str = "", **kwargs: Any) -> fx.Node:
        """Add a call of `target`, an ATen overload or another function, under the name `title` or its own."""
        with torch.no_grad():
            value = target(*self._faked(args), **self._faked(kwargs))
        node = self.graph.create_node("call_function", target, args, kwargs, name=title or _title(target))
        return self._with_value(node, value)

    def leave(self, node: onnx.NodeProto) -> None:
        """Leave a node behind: no graph needs it but those that read what it computes, which are left behind too."""
        self.tail.append(node)
        self.behind.update(filter(None, node.output))

    def _faked(self, args: Any) -> Any:
        return fx.node.map_arg(args, self._fake.__getitem__)

    def keep(self, name: str, value: fx.Node | Known) -> None:
        """Enter what a value's name stands for; constants may take no more memory together than the limit."""
        if isinstance(value, Known):
            array = value.array if value.base is None else value.base.array
            self._known_bytes += array.nbytes
            check_memory(self._known_bytes, f"{self.model}: constants up to {name!r}", ModelError)
        self.values[name] = value

    def _with_value(self, node: fx.Node, value: Any) -> fx.Node:
        self._fake[node] = value
        if isinstance(value, torch.Tensor):
            what = f"{self.model}: {node.name} of shape {tuple(value.shape)}"
            check_memory(value.numel() * value.element_size(), what, ModelError)
            note_value(node, value)
        return node

    def shape(self, value: fx.Node | Known) -> tuple[int, ...]:
        """The shape that `value` has at the imported batch size."""
        return tuple(value.array.shape if isinstance(value, Known) else self._fake[value].shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every value that is one tensor."""
        return {name: self.shape(value) for name, value in self.values.items()}

    def arrays(self) -> dict[str, Array]:
        """The values that do not depend on the images."""
        return {name: value.array for name, value in self.values.items() if isinstance(value, Known)}

    def dtype(self, value: fx.Node | Known) -> torch.dtype:
        """The element type of `value`; raises ModelError for one torch does not have."""
        if isinstance(value, Known):
            return _tensor(np.zeros((), value.array.dtype), value.name, self.model).dtype
        return self._fake[value].dtype  # type: ignore[no-any-return]

    def node(self, value: fx.Node | Known) -> fx.Node:
        """The fx node of `value`; a known one is stored once and shared by all its users."""
        if isinstance(value, fx.Node):
            return value
        if value.base is None:
            return self.stored(value)
        key = (value.name, False)
        if key not in self._stored:
            sizes = list(value.array.shape)
            node = self._stored[key] = self.call(torch.ops.aten.expand.default, self.node(value.base), sizes)
            set_notes(node, replace(notes(node), origin=value.name))
        return self._stored[key]

    def stored(self, value: Known, *, transposed: bool = False) -> fx.Node:
        """The `get_attr` of a known value, or of its transpose."""
        key = (value.name, transposed)
        if key not in self._stored:
            array = value.array.T if transposed else value.array
            node = self._attribute(value.name, _tensor(array, value.name, self.model))
            set_notes(node, replace(notes(node), origin=value.name, transposed=transposed))
            self._stored[key] = node
        return self._stored[key]

    def constant(self, name: str, array: Array) -> fx.Node:
        """The `get_attr` of a tensor that the file does not have; it carries no origin."""
        return self._attribute(name, _tensor(array, name, self.model))

    def _attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        attribute = base = _identifier(name)
        count = 1
        while hasattr(self.root, attribute):
            attribute, count = f"{base}_{count}", count + 1
        self.root.register_buffer(attribute, tensor)
        return self._with_value(self.graph.create_node("get_attr", attribute), tensor.to("meta"))

    def finish(self, outputs: Sequence[str]) -> fx.GraphModule:
        """Close the graph with the ONNX values `outputs` and make a module of it."""
        lost = next((name for name in outputs if name not in self.values), None)
        if lost is not None:
            raise ModelError(f"{self.model}: its output {lost!r} is computed by no node")
        nodes = [self.node(self.values[name]) for name in outputs]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        for node in self.graph.nodes:
            if node.op == "call_function" and notes(node).origin is None:
                set_notes(node, replace(notes(node), inner=True))
        return fx.GraphModule(self.root, self.graph).eval()


def _identifier(name: str) -> str:
    text = re.sub(r"\W", "_", name, flags=re.ASCII) or "value"
    return f"_{text}" if text[0].isdigit() else text


def _title(target: Any) -> str:
    """`aten.conv2d.default` -> conv2d, as `torch.export` calls its nodes."""
    return str(target._schema.name.split("::")[-1] if hasattr(target, "_schema") else target.__name__)


def _tensor(array: Array, name: str, model: str) -> torch.Tensor:
    if array.dtype.name in REFUSED_DTYPES:
        raise ModelError(f"{model}: tensor {name!r} is {array.dtype.name}: {FLOAT32_ONLY}")
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise ModelError(f"{model}: tensor {name!r} is {array.dtype.name}, which torch has no counterpart for") from error


class Op:
    """One ONNX node as its operator's function sees it: inputs by position, attributes by name."""

    def __init__(self, builder: Builder, node: onnx.NodeProto) -> None:
        self.builder = builder
        self.node = node
        self.opset = builder.opset
        self._attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value: int, float, str, or a list of them."""
        value = self._attributes.get(name, default)
        if isinstance(value, bytes):
            return value.decode()
        return list(value) if isinstance(value, tuple) or type(value).__name__.startswith("Repeated") else value

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.input) and self.node.input[index] != ""

    def value(self, index: int) -> fx.Node | Known:
        """Input `index`, computed or known."""
        if not self.has(index):
            self.refuse(f"input {index} is missing")
        return self.builder.values[self.node.input[index]]

    def tensor(self, index: int) -> fx.Node:
        """The fx node of input `index`."""
        return self.builder.node(self.value(index))

    def tensors(self) -> list[fx.Node]:
        """The fx nodes of all inputs."""
        return [self.tensor(index) for index in range(len(self.node.input))]

    def optional(self, index: int) -> fx.Node | None:
        """The fx node of input `index`, None where it is left out."""
        return self.tensor(index) if self.has(index) else None

    def is_known(self, index: int) -> bool:
        """Whether input `index` is given and does not depend on the images."""
        return self.has(index) and isinstance(self.value(index), Known)

    def known(self, index: int) -> Array:
        """Input `index`, which must not depend on the images; UnsupportedOperator otherwise."""
        value = self.value(index)
        if not isinstance(value, Known):
            self.refuse(f"input {index} ({self.node.input[index]!r}) depends on the images, and is no constant", Computed)
        return value.array

    def integers(self, index: int) -> list[int]:
        """A known input as a list of ints."""
        return [int(item) for item in np.ravel(self.known(index))]

    def scalar(self, index: int) -> float:
        """A known input of one element."""
        array = self.known(index)
        if array.size != 1:
            self.refuse(f"input {index} ({self.node.input[index]!r}) has {array.size} elements instead of one")
        item: float = array.item()
        return item

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of input `index` at the imported batch size."""
        return self.builder.shape(self.value(index))

    def rank(self, index: int = 0) -> int:
        """The number of dimensions of input `index`."""
        return len(self.shape(index))

    def axis(self, default: int, name: str = "axis") -> int:
        """An axis attribute, counted from the front."""
        axis = int(self.attribute(name, default))
        return axis + self.rank() if axis < 0 else axis

    def axes(self, index: int, name: str = "axes") -> list[int] | None:
        """Axes given as input `index` or, in older opsets, as an attribute; sorted, counted from the front."""
        axes = self.integers(index) if self.has(index) else self.attribute(name)
        return None if axes is None else sorted(int(axis) % self.rank() for axis in axes)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of `target` to the graph."""
        return self.builder.call(target, *args, **kwargs)

    def constant(self, suffix: str, array: Array) -> fx.Node:
        """A helper tensor, named after this node's output."""
        return self.builder.constant(f"{self.node.output[0]}_{suffix}", array)

    def only_first_output(self) -> None:
        """Refuse where a further output of this node is asked for."""
        if any(self.node.output[1:]):
            self.refuse(f"its output {next(filter(None, self.node.output[1:]))!r} is used; only the first can be computed")

    def refuse(self, why: str, kind: type[UnsupportedOperator] = UnsupportedOperator) -> NoReturn:
        """Raise UnsupportedOperator, naming this node."""
        raise kind(f"{self.builder.model}: node {label(self.node)!r} ({self.node.op_type}): {why}")


def label(node: onnx.NodeProto) -> str:
    """What to call a node in a message: its name or, without one, its first output's."""
    return node.name or next(iter(node.output), "?")


Function = Callable[[Op], Any]  # of fx.Node, Known, or a list of them: one per output

OPERATORS: dict[str, Function] = {}


def operator(*names: str) -> Callable[[Function], Function]:
    """Enter a function into the table as the import of the operators `names`."""

    def enter(function: Function) -> Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return enter
