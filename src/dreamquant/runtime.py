"""ONNX Runtime on the processor: the real runtime that exported files are run in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from dreamquant.errors import ModelError, OptionError, blamed
from dreamquant.limits import check_memory, memory
from dreamquant.onnx_guard import check_file

DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
MICROSOFT = "com.microsoft"  # the domain of what the runtime knows beyond the standard
LAYOUT_KEY = "dreamquant.layout"  # a property of a model file
MOST_THREADS = 1024
FEW = (1, 3, 4)  # channels that images have
_FATAL_ONLY = 4  # what is wrong with a file is raised, and told by us
_SHRINKING = "memory.enable_memory_arena_shrinkage"
_SHARED_ARENA, _FOLDED_LIMIT = "session.use_env_allocators", "optimization.constant_folding_max_output_size_in_bytes"
_RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


class Output(NamedTuple):
    """What a file says of one of its outputs: the runtime's name of its type, and its sizes, names where they are open."""

    kind: str
    sizes: tuple[int | str | None, ...]


class OnnxRunner:
    """An ONNX file in ONNX Runtime on the processor: float32 (n, C, H, W) -> its first output, or any others.

    `input_shape` is (C, H, W) with None where the file leaves it open, `batch` the only batch size it takes or None for
    any, `layout` how it takes images, `outputs` all outputs by name in the file's order, or the inner values that it was opened
    for, `metadata` its custom properties. A file
    of one batch size is fed in pieces, the last one filled up; each output is put together along the axis of its images, which
    `axes` holds by name: that which the file names as it names its input's, else the first whose size is the batch's, or open.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int | None,
        optimize: bool,
        layout: str | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        self.name = "the ONNX model" if isinstance(source, bytes) else str(source)
        self.session = _session(source, self.name, threads, optimize)
        if not {output.name for output in self.session.get_outputs()}.issuperset(shown):
            proto = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
            self.session = _session(opened(proto, shown), self.name, threads, optimize)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in DTYPES or len(inputs[0].shape) != 4:
            given = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
            raise ModelError(
                f"{self.name} takes {given or 'no input'}, not one batch of images (N, C, H, W) in {', '.join(DTYPES)}"
            )
        if not self.session.get_outputs():
            raise ModelError(f"{self.name} gives no output")
        self.input_name: str = inputs[0].name
        found = {o.name: Output(o.type, tuple(o.shape)) for o in self.session.get_outputs()}
        self.outputs: dict[str, Output] = {name: found[name] for name in shown or found}
        self.output_name: str = next(iter(self.outputs))
        self.dtype = DTYPES[inputs[0].type]
        with blamed(ModelError, f"{self.name} has properties that cannot be read"):
            self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        sizes = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]
        self.batch: int | None = sizes[0]
        self.axes = {name: _images_axis(output.sizes, inputs[0].shape[0]) for name, output in self.outputs.items()}
        self.layout = layout or self.metadata.get(LAYOUT_KEY) or guessed_layout(sizes)
        one, two, three = sizes[1:]
        check_memory(4 * math.prod(size or 1 for size in sizes), f"{self.name}: images {tuple(sizes)}", ModelError)
        self.input_shape: tuple[int | None, int | None, int | None] = (
            (three, one, two) if self.layout == "NHWC" else (one, two, three)
        )

    def looked_into(self, names: Sequence[str], *, threads: int | None = None) -> OnnxRunner:
        """The same file, opened for inner values of these names; itself where they are its outputs, or it has no such values."""
        path = Path(self.name)
        if not names or list(names) == list(self.outputs) or not has_values(onnx.load(path, load_external_data=False), names):
            return self
        return OnnxRunner(path, threads=threads, optimize=True, layout=self.layout, shown=names)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """The first output on images (n, C, H, W), n at least 1; ModelError where the runtime refuses them."""
        return self.run(images, [self.output_name])[0]

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs of these names on images (n, C, H, W), n at least 1; ModelError where the runtime refuses them.

        What a file of one batch size gives for each piece is put together along the axis of the images.
        """
        step = self.batch or len(images)
        pieces = [self._piece(images[i : i + step], step, names) for i in range(0, len(images), step)]
        joined = zip(names, zip(*pieces, strict=True), strict=True)
        return [np.concatenate(values, self.axes.get(name, 0)) for name, values in joined]

    def all(self, images: NDArray[np.float32]) -> list[NDArray[Any]]:
        """All outputs, in the file's order, on images (n, C, H, W), as `run` gives them."""
        return self.run(images, list(self.outputs))

    def fed(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Images (n, C, H, W) in the layout and number type that the file takes."""
        moved = np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if self.layout == "NHWC" else images
        return (moved.round().clip(0, 255) if self.dtype == np.uint8 else moved).astype(self.dtype, copy=False)

    def _piece(self, images: NDArray[np.float32], size: int, names: Sequence[str]) -> list[NDArray[Any]]:
        count = len(images)
        if count < size:
            images = np.concatenate([images, np.repeat(images[:1], size - count, axis=0)])
        with refusals(f"{self.name} does not run"):
            given = self.session.run(list(names), {self.input_name: self.fed(images)}, run_options())
        outputs = [np.atleast_1d(one.astype(np.float32) if one.dtype == np.float16 else one) for one in given]
        if count == size:
            return outputs
        axes = [self.axes.get(name, 0) for name in names]
        return [
            output.take(range(output.shape[axis] * count // size), axis) if output.shape[axis] % size == 0 else output
            for output, axis in zip(outputs, axes, strict=True)
        ]


def _images_axis(sizes: tuple[int | str | None, ...], batch: int | str | None) -> int:
    return sizes.index(batch) if batch is not None and batch in sizes else 0


def guessed_layout(sizes: Sequence[int | None]) -> str:
    """The layout of images (N, a, b, c) by their sizes alone: channels last where only the last can be a number of channels."""
    first, last = sizes[1], sizes[3]
    return "NHWC" if last in FEW and first is not None and first > max(FEW) else "NCHW"


def has_values(proto: onnx.ModelProto, names: Iterable[str]) -> bool:
    """Whether nodes of a model compute values of all these names."""
    return {name for node in proto.graph.node for name in node.output}.issuperset(names)


def opened(proto: onnx.ModelProto, shown: Iterable[str]) -> bytes:
    """A model that gives some of its inner values too."""
    wider = onnx.ModelProto()
    wider.CopyFrom(proto)
    given = {output.name for output in proto.graph.output}
    wider.graph.output.extend(onnx.helper.make_value_info(name, onnx.TypeProto()) for name in shown if name not in given)
    model: bytes = wider.SerializeToString()
    return model


def onnx_runner(
    source: Path | bytes,
    *,
    threads: int | None = None,
    optimize: bool = True,
    layout: str | None = None,
    shown: Sequence[str] = (),
) -> OnnxRunner:
    """An ONNX file, or its bytes, ready to run on the processor.

    `threads` is the number of threads inside one operator, None for the runtime's own choice; with `optimize` off the graph is
    run as it is written. `layout` is how it takes images, where neither its properties nor its sizes tell. `shown` are values of
    the graph that stand in for its outputs. Raises ModelError
    when the file is missing, corrupt, not supported by the runtime, or takes anything but one batch of images; OptionError when
    `threads` is below 1.
    """
    return OnnxRunner(source, threads=threads, optimize=optimize, layout=layout, shown=shown)


def computed(model: bytes) -> dict[str, NDArray[Any]]:
    """The outputs, by name, of an ONNX model without inputs, run as it is written; ModelError where the runtime refuses it."""
    session = _session(model, "the ONNX model", None, optimize=False)
    names = [output.name for output in session.get_outputs()]
    with refusals("the ONNX model does not run"):
        return dict(zip(names, session.run(names, {}), strict=True))


def computing(model: bytes, name: str) -> Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]:
    """All outputs of an ONNX model, which messages call `name`, as a function of its inputs by name, run on one thread.

    Function and `computing` itself raise ModelError where the runtime refuses.
    """
    session = _session(model, name, 1, optimize=False)

    def run(inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        with refusals(f"{name} does not run"):
            return [np.asarray(value) for value in session.run(None, inputs)]

    return run


@cache
def contributed() -> frozenset[str]:
    """The operators of the domain com.microsoft that the runtime knows."""
    return frozenset(schema.name for schema in _state.get_all_operator_schema() if schema.domain == MICROSOFT)


def _session(source: Path | bytes, name: str, threads: int | None, optimize: bool) -> onnxruntime.InferenceSession:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise OptionError(f"{threads} threads are impossible, it must be at least 1 and at most {MOST_THREADS}")
    with blamed(ModelError, f"{name} cannot be read"):
        if isinstance(source, Path) and not source.is_file():
            raise ModelError(f"there is no file {source}")
    options = session_options()
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(source, Path):
        check_file(source)
    with refusals(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}"):
        given = source if isinstance(source, bytes) else str(source)
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def session_options() -> onnxruntime.SessionOptions:
    """Options of a session that writes nothing on the error stream and takes no more memory than `limits.memory()`."""
    _bounded_arena()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry(_SHARED_ARENA, "1")
    options.add_session_config_entry(_FOLDED_LIMIT, str(memory() // 16))
    return options


@cache
def run_options() -> onnxruntime.RunOptions:
    """Options of a run after which the arena hands back what it does not hold: a large batch leaves nothing behind."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_run_config_entry(_SHRINKING, "cpu:0")
    return options


@cache
def _bounded_arena() -> None:
    """One arena for all sessions of the process: sizes in a file may ask for anything, and it gives no more than the limit."""
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)
    place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    as_asked = {"max_mem": memory(), "arena_extend_strategy": 1}
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(as_asked))


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors into a ModelError of one line that begins with `what`."""
    try:
        yield
    except _RUNTIME_ERRORS as error:
        raise ModelError(f"{what}: {' '.join(str(error).split())}") from error
