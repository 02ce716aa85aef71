"""The ONNX graph under construction, and the table of functions that write one ATen operator each.

An emitter is a function `(g, *args, **kwargs)` of the arguments of its ATen overload: tensors arrive as `Value`,
integers that depend on the batch as `Symbol`, everything else as it stands in the graph. It calls `g.op(...)` and
returns the name of its result, or a list of names for an operator that returns several tensors; `g.finish` names
them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from dreamquant.exporters.onnx_emit.facts import Fact
from dreamquant.network.graph import aten

DTYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
_INTEGERS: dict[Any, str] = {
    operator.mul: "Mul",
    operator.add: "Add",
    operator.sub: "Sub",
    operator.floordiv: "Div",
    operator.mod: "Mod",
}


class Refused(Exception):  # noqa: N818 - a signal between an emitter and `emit`, never seen outside
    """This use of an operator has no ONNX form; the message says why."""


def refuse(reason: str) -> NoReturn:
    """Say that the current node cannot be written; `emit` collects the reasons."""
    raise Refused(reason)


@dataclass(frozen=True)
class Value:
    """A tensor in the ONNX graph; `shape` has None where a dimension depends on the batch.

    `tensor` is set for stored tensors: what the initializer holds, before any transposition.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    tensor: Tensor | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def axis(self, dim: int) -> int:
        """`dim` counted from the front."""
        return dim % max(self.rank, 1)

    def size(self, dim: int) -> int:
        """The size of a dimension that has to be known; refuses one that depends on the batch."""
        found = self.shape[dim]
        return refuse(f"dimension {dim} depends on the batch") if found is None else found


@dataclass(frozen=True)
class Symbol:
    """An integer that depends on the batch."""

    node: fx.Node


Operand = Value | str
Emitter = Callable[..., "str | list[str | None]"]
EmitterT = TypeVar("EmitterT", bound=Emitter)
EMITTERS: dict[Any, Emitter] = {}


def emits(*targets: Any) -> Callable[[EmitterT], EmitterT]:
    """Enter a function into the table of emitters for these ATen overloads."""

    def register(emitter: EmitterT) -> EmitterT:
        EMITTERS.update(dict.fromkeys(targets, emitter))
        return emitter

    return register


def name_of(operand: Operand) -> str:
    """The name of a value."""
    return operand.name if isinstance(operand, Value) else operand


class Builder:
    """Nodes and initializers of an ONNX graph, and the names that are taken."""

    def __init__(self, opset: int, facts: dict[fx.Node, Fact]) -> None:
        self.opset = opset
        self.facts = facts
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: dict[fx.Node, Value] = {}
        self.current: fx.Node
        self.result_name = ""
        self._taken: set[str] = set()
        self._stored: set[str] = set()
        self._final: set[str] = set()
        self._symbols: dict[fx.Node, str] = {}
        self._start = 0

    def unique(self, base: str) -> str:
        """`base`, or `base_1`, ... where it is taken."""
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    # --- the node at work ------------------------------------------------------------------------------------------
    def begin(self, node: fx.Node, result_name: str) -> None:
        """Start on a node whose result, or the base of whose derived names, is `result_name`."""
        self.current, self.result_name, self._start = node, result_name, len(self.nodes)

    def abandon(self) -> None:
        """Take back the nodes written for the current node."""
        del self.nodes[self._start :]

    @property
    def fact(self) -> Fact:
        """What is known of the current node's result."""
        return self.facts[self.current]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the current node's result."""
        return self.fact.dtype or refuse("its result is not one tensor")

    @property
    def used(self) -> set[int]:
        """Which items of the current node's results anyone takes."""
        return {int(user.args[1]) for user in self.current.users if user.target is operator.getitem}  # type: ignore[arg-type]

    def finish(self, result: str, name: str, label: str) -> None:
        """Let the value `result` of the current node be called `name`, and the node that gives it `label`."""
        producer = next((node for node in self.nodes[self._start :] if result in node.output), None)
        if producer is None or result in self._final:
            self.nodes.append(helper.make_node("Identity", [result], [name], name=label))
            return
        self._final.add(name)
        for node in self.nodes[self._start :]:
            for field in (node.input, node.output):
                field[:] = [name if item == result else item for item in field]
        producer.name = label

    # --- nodes and constants ---------------------------------------------------------------------------------------
    def op(self, op_type: str, *inputs: Operand | None, **attributes: Any) -> str:
        """Write a node of one output; a None input is an optional one left out."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: Operand | None, outputs: int, **attributes: Any) -> list[str]:
        """Write a node of several outputs."""
        names = ["" if operand is None else name_of(operand) for operand in inputs]
        while names and not names[-1]:
            names.pop()
        made = [self.unique(f"{self.result_name}/{op_type}") for _ in range(outputs)]
        label = f"{self.current.name}/{made[0].rsplit('/', 1)[1]}"
        self.nodes.append(helper.make_node(op_type, names, made, name=label, **attributes))
        return made

    def store(self, tensor: Tensor, name: str) -> str:
        """An initializer."""
        if tensor.dtype not in DTYPES:
            refuse(f"{tensor.dtype} constants cannot be stored")
        array = tensor.detach().cpu().contiguous().numpy()
        self.initializers.append(numpy_helper.from_array(array, name))
        self._stored.add(name)
        return name

    def is_constant(self, name: str) -> bool:
        """Whether a name is an initializer's."""
        return name in self._stored

    def const(self, value: Any, dtype: torch.dtype, what: str = "const") -> str:
        """A small constant of the current node."""
        return self.store(torch.as_tensor(value, dtype=dtype), self.unique(f"{self.result_name}/{what}"))

    def ints(self, values: Sequence[int], what: str = "ints") -> str:
        """A vector of integers."""
        return self.const(list(values), torch.int64, what)

    def cast(self, operand: Any, dtype: torch.dtype) -> str:
        """A tensor or a Python number as `dtype`."""
        if isinstance(operand, Value):
            if operand.dtype == dtype:
                return operand.name
            constant = operand.tensor
            return self.op("Cast", operand, to=DTYPES[dtype]) if constant is None else self.const(constant, dtype)
        if isinstance(operand, Symbol):
            scalar = self.op("Squeeze", self.symbol(operand.node), self.ints([0], "axes"))
            return self.op("Cast", scalar, to=DTYPES[dtype])
        return self.const(operand, dtype)

    # --- shapes ----------------------------------------------------------------------------------------------------
    def symbol(self, node: fx.Node) -> str:
        """An integer of the graph that depends on the batch, as an ONNX vector of one int64."""
        if node not in self._symbols:
            self._symbols[node] = self._compute(node)
        return self._symbols[node]

    def _compute(self, node: fx.Node) -> str:
        if node.target is aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(dim, int)
            shape = self.op("Shape", self.values[source])
            return self.op("Gather", shape, self.ints([self.values[source].axis(dim)], "axis"), axis=0)
        if node.target in _INTEGERS:
            return self.op(_INTEGERS[node.target], *(self._integer(argument) for argument in node.args))
        return refuse(f"the integer operation {node.target} ({node.name}) is not known")

    def _integer(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            known = self.facts[argument].value
            return self.symbol(argument) if known is None else self.ints([known])
        return self.ints([argument])

    def dims(self, values: Sequence[int | Symbol], what: str = "shape") -> str:
        """A vector of integers, some of which may depend on the batch."""
        literals = [value for value in values if isinstance(value, int)]
        if len(literals) == len(values):
            return self.ints(literals, what)
        parts = [self.symbol(v.node) if isinstance(v, Symbol) else self.ints([v], what) for v in values]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, x: Operand, shape: Sequence[int | None], given: Sequence[int | Symbol] = ()) -> str:
        """`x` in `shape`; `given` are the sizes to compute where more than one of them depends on the batch."""
        if sum(size is None for size in shape) <= 1:
            return self.op("Reshape", x, self.ints([-1 if size is None else size for size in shape], "shape"))
        if not given:
            refuse(f"more than one dimension of its shape {tuple(shape)} depends on the batch")
        sizes = [size if size is not None else given[i] for i, size in enumerate(shape)]
        return self.op("Reshape", x, self.dims(sizes))

    def shape_of(self, shape: Sequence[int | None], like: Value) -> str:
        """The vector `shape`, its batch-dependent sizes read off `like`, which has them in the same places."""
        if None not in shape:
            return self.ints([size or 0 for size in shape], "shape")
        if any(size is None and (i >= like.rank or like.shape[i] is not None) for i, size in enumerate(shape)):
            refuse(f"its shape {tuple(shape)} depends on the batch in a way that its input does not show")
        actual = self.op("Shape", like)
        return self.op("Concat", *(self._size(actual, i, size) for i, size in enumerate(shape)), axis=0)

    def _size(self, actual: str, index: int, size: int | None) -> str:
        return self.op("Gather", actual, self.ints([index], "axis"), axis=0) if size is None else self.ints([size], "shape")

    def axes(self, op_type: str, x: Operand, axes: Sequence[int], since: int = 13, **attributes: Any) -> str:
        """A node whose axes are an input since opset `since` and an attribute before."""
        if self.opset >= since:
            return self.op(op_type, x, self.ints(axes, "axes"), **attributes)
        return self.op(op_type, x, axes=list(axes), **attributes)


def ints_of(values: Any, count: int) -> list[int]:
    """ATen's list of one or `count` integers, or an integer, as `count` integers."""
    items = list(values) if isinstance(values, tuple | list) else [values]
    return [int(item) for item in (items * count if len(items) == 1 else items)]
