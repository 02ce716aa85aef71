"""torch in: a module or an exported program becomes a flat graph of ATen operations."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dreamquant.errors import ModelError
from dreamquant.network.batch import free_batch
from dreamquant.network.canonical import DECOMPOSITIONS, canonicalize, flatten_attributes
from dreamquant.network.constants import fold_constants
from dreamquant.network.front import (
    channels_first,
    take_channels_first,
    take_float32,
    turns_channels_first,
)
from dreamquant.network.graph import Network, Source, aten, is_input, tensor_of
from dreamquant.network.input_space import DTYPES, standard
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import exported_value, is_tensor, notes, set_notes, shape_of
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.network.outputs import find_outputs
from dreamquant.network.stored_layers import name_layers
from dreamquant.runtime import guessed_layout

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
OF_THE_BATCH: set[Any] = {aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats}
ALONE = "its answer to an image depends on what else is in the batch, or its graph is that of one batch: images go in one by one"


def noise(count: int, input_shape: tuple[int, ...], *, seed: int) -> Tensor:
    """N(0, 1) images (count, C, H, W) of a seed; the global generator is not touched."""
    return torch.randn((count, *input_shape), generator=torch.Generator().manual_seed(seed))


def capture(
    module: nn.Module | torch.export.ExportedProgram,
    input_shape: tuple[int, int, int] | None = None,
    *,
    layout: str | None = None,
    source: Source | None = None,
) -> Network:
    """The `Network` of a module (run in eval mode, `input_shape` (C, H, W) needed) or of an exported program.

    `layout` is how it takes images; where that is not given, what its first permutation or its sizes tell. BatchNorms stay as
    they are; what is computed from parameters alone is stored, and numbers of another precision become float32. A graph that
    turns out to be bound to one batch size is freed from it where that can be proved; a module that cannot be, as one whose
    images know of each other, takes them one by one. `Network.remarks` says what is not as it was. Its input space is mean 0
    and deviation 1 until `load` decides on it. Raises `ModelError` for a module that `torch.export` cannot trace, or a network
    that has not one image input, or does not answer the same to the same image.
    """
    if isinstance(module, torch.export.ExportedProgram):
        source = source or Source("module", "a program")
        return _of_program(module, *_program_input(module, source), input_shape, layout, source)
    module = _unwrapped(module)
    source = source or Source("module", type(module).__name__)
    if input_shape is None:
        raise ModelError(f"{source.text}: a module does not tell the size of its images: give input_shape (--input-shape C,H,W)")
    channels, height, width = input_shape
    one = (height, width, channels) if layout == "NHWC" else input_shape
    network = _of_program(*_export(module, 2, one, source), input_shape, layout, source)
    if network.batch is None:
        return network
    network = _of_program(*_export(module, 1, one, source), input_shape, layout, source)
    return network if network.batch is None else replace(network, remarks=(*network.remarks, ALONE))


def _of_program(
    program: torch.export.ExportedProgram,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    input_shape: tuple[int, int, int] | None,
    layout: str | None,
    source: Source,
) -> Network:
    """The network of a program that takes images of `sizes`, their batch first, in `dtype`."""
    remarks = [f"numbers in {' and '.join(found)} become float32" for found in [_precisions(program)] if found]
    graph = flatten(program)
    take_float32(graph)
    if layout is None:
        layout = "NHWC" if turns_channels_first(graph.graph) else guessed_layout(sizes)
    shape = channels_first(sizes[1:], layout)
    if input_shape not in (None, shape):
        raise ModelError(f"{source.text}: the program was exported for images {shape}, not {input_shape}")
    if layout == "NHWC":
        take_channels_first(graph)
    batch, images = sizes[0], noise(sizes[0], shape, seed=0)
    _check(graph, source)
    record_shapes(graph, images)
    remarks += _keep_tensors(graph, source)
    free = free_batch(graph, shape, batch)
    fold_constants(graph)
    name_layers(graph)
    graph = fx.GraphModule(graph, graph.graph)  # without the tensors that nothing reads any more
    record_shapes(graph, images)
    _check_computed(graph, source)
    kind = str(dtype).removeprefix("torch.")
    if kind not in DTYPES:
        remarks.append(f"images are taken in float32, not in {kind}")
    space = replace(standard(shape[0]), layout=layout, dtype=kind if kind in DTYPES else "float32")
    network = Network(graph, shape, source, space, free, remarks=tuple(remarks))
    return replace(network, outputs=find_outputs(network))


def flatten(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The flat inner graph of an exported program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional: Any = program.run_decompositions(DECOMPOSITIONS)
        module = functional.module()
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    canonicalize(graph)
    flat = flatten_attributes(module, graph)
    flat.eval()
    for node in flat.graph.nodes:
        set_notes(node, notes(node))
    flat.graph.lint()
    flat.recompile()
    return flat


def capture_module(module: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The flat graph alone, its shapes recorded; see `capture`."""
    return capture(module, input_shape).graph


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that a wrapper for several devices, or of `torch.compile`, runs."""
    while True:
        inner = module.module if isinstance(module, WRAPPERS) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _export(
    module: nn.Module, batch: int, one: tuple[int, ...], source: Source
) -> tuple[torch.export.ExportedProgram, tuple[int, ...], torch.dtype]:
    """A module's program for a batch of images of the sizes `one`, the sizes of that batch, and its precision: float32, or what
    one of its parameters has."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{source.text}: a TorchScript module cannot be exported; give the module that it was made from")
    was_training = {child: child.training for child in module.modules()}
    others = [tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()]
    sizes, failure = (batch, *one), None
    module.eval()
    try:
        for dtype in dict.fromkeys((torch.float32, *others)):
            try:
                return _traced(module, noise(batch, one, seed=0).to(dtype)), sizes, dtype
            except Exception as error:  # what a module does may raise anything
                failure = failure or error
    finally:
        for child, training in was_training.items():
            child.training = training
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    raise ModelError(f"{source.text}: torch.export cannot trace it on images {one}: {reason}") from failure


def _traced(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    free: Any = {0: torch.export.Dim.AUTO}
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    if first is not None and first.kind == first.VAR_POSITIONAL:  # a wrapper's forward(*images)
        free = (free,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (images,), dynamic_shapes=(free,) if len(images) > 1 else None)


def _program_input(program: torch.export.ExportedProgram, source: Source) -> tuple[tuple[int, int, int, int], torch.dtype]:
    """Sizes of a program's images as it takes them, its batch first, and their number type."""
    names = set(program.graph_signature.user_inputs)
    values = [exported_value(node) for node in program.graph.nodes if is_input(node) and node.name in names]
    if len(values) != 1 or values[0].dim() != 4:
        found = ", ".join(str(tuple(value.shape)) for value in values) or "none"
        raise ModelError(f"{source.text}: one input of images (N, C, H, W) is needed, the program has {found}")
    dtype = values[0].dtype
    if not dtype.is_floating_point and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ModelError(f"{source.text}: the input is {dtype}; images in {', '.join(DTYPES)} are known")
    sizes = [size if isinstance(size, int) else None for size in values[0].shape]
    if None in sizes[1:]:
        raise ModelError(f"{source.text}: the program's image size {tuple(values[0].shape)} is dynamic; export it for one size")
    return (sizes[0] or 2, sizes[1] or 0, sizes[2] or 0, sizes[3] or 0), dtype


def _precisions(program: torch.export.ExportedProgram) -> list[str]:
    """The precisions other than float32 that a program has numbers in."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    values = [exported_value(node) for graph in graphs for node in graph.nodes if node.users]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found - {torch.float32})


def _keep_tensors(graph: fx.GraphModule, source: Source) -> list[str]:
    """Leave out what is returned beside tensors that may have an axis of images; what that is, in words."""
    end = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    found: Any = end.args[0] if isinstance(end.args[0], tuple | list) else (end.args[0],)
    kept = tuple(one for one in found if isinstance(one, fx.Node) and is_tensor(one) and shape_of(one))
    if not kept:
        raise ModelError(f"{source.text}: it returns no tensor of answers to images")
    end.args = (kept[0] if len(kept) == 1 else kept,)
    graph.recompile()
    left = [(place, "one number" if isinstance(one, fx.Node) else one) for place, one in enumerate(found) if one not in kept]
    return [f"output {place} is {one}, no answer to each image, and left out" for place, one in left]


def _check(graph: fx.GraphModule, source: Source) -> None:
    """`ModelError` for what is no fixed function of one batch of images."""
    if sum(map(is_input, graph.graph.nodes)) != 1:
        raise ModelError(f"{source.text}: one input of images (N, C, H, W) is needed")
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ModelError(f"{source.text}: what it computes depends on values ({node.target}); one graph is needed")
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise ModelError(f"{source.text}: it draws random numbers as it runs ({node.target}); a fixed answer is needed")
    for name, tensor in graph.named_buffers():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise ModelError(f"{source.text}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")


def _check_computed(graph: fx.GraphModule, source: Source) -> None:
    """`ModelError` for what only shows once all that can be stored is."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor, weighs = tensor_of(graph, node), any(is_call(user, WEIGHTED) for user in node.users)
            bad = int((~tensor.isfinite() if weighs else tensor.isnan()).sum())  # masks are infinite
            if bad:
                values = f"{bad} of {tensor.numel()} values of {node.target}"
                raise ModelError(f"{source.text}: {values} are NaN or infinite once they are computed")
        if is_call(node, OF_THE_BATCH):
            raise ModelError(
                f"{source.text}: {node} normalises by the statistics of the batch that an image is in; a BatchNorm with running"
                " statistics is needed"
            )
