"""torch in: a module or an exported program becomes a flat graph of ATen operations."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from dreamquant.errors import ModelError
from dreamquant.network.batch import free_batch
from dreamquant.network.canonical import DECOMPOSITIONS, canonicalize, flatten_attributes
from dreamquant.network.front import (
    channels_first,
    take_channels_first,
    take_float32,
    turns_channels_first,
)
from dreamquant.network.graph import Network, Source, is_input, output_nodes
from dreamquant.network.input_space import DTYPES, standard
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import exported_value, is_tensor, notes, set_notes
from dreamquant.network.outputs import find_outputs
from dreamquant.runtime import guessed_layout


def noise(count: int, input_shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
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
    they are; numbers in half precision become float32. A graph that turns out to be bound to one batch size is freed from it
    where that can be proved. Its input space is mean 0 and deviation 1 until `load` decides on it. Raises `ModelError` for a
    module that `torch.export` cannot trace or a network that has not one image input.
    """
    source = source or Source("module", type(module).__name__)
    if isinstance(module, torch.export.ExportedProgram):
        program, sizes, dtype = module, *_program_input(module, source)
    elif input_shape is None:
        raise ModelError(f"{source.text}: a module does not tell the size of its images: give input_shape (--input-shape C,H,W)")
    else:
        half = any(tensor.dtype == torch.float16 for tensor in module.parameters())
        dtype = torch.float16 if half else torch.float32
        channels, height, width = input_shape
        sizes = (2, height, width, channels) if layout == "NHWC" else (2, *input_shape)
        program = _export(module, sizes, dtype, source)
    graph = flatten(program)
    if dtype != torch.float32:
        take_float32(graph)
    if layout is None:
        layout = "NHWC" if turns_channels_first(graph.graph) else guessed_layout(sizes)
    shape = channels_first(sizes[1:], layout)
    if input_shape not in (None, shape):
        raise ModelError(f"{source.text}: the program was exported for images {shape}, not {input_shape}")
    if layout == "NHWC":
        take_channels_first(graph)
    batch = sizes[0]
    _keep_tensors(graph, source)
    record_shapes(graph, noise(batch, shape, seed=0))
    _check(graph, source)
    free = free_batch(graph, shape, batch)
    space = replace(standard(shape[0]), layout=layout, dtype=str(dtype).removeprefix("torch."))
    network = Network(graph, shape, source, space, free)
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


def _export(module: nn.Module, sizes: tuple[int, ...], dtype: torch.dtype, source: Source) -> torch.export.ExportedProgram:
    was_training = {child: child.training for child in module.modules()}
    module.eval()
    images = noise(sizes[0], sizes[1:], seed=0).to(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source.text}: torch.export cannot trace it on images {sizes[1:]}: {reason}") from error
    finally:
        for child, training in was_training.items():
            child.training = training


def _program_input(program: torch.export.ExportedProgram, source: Source) -> tuple[tuple[int, int, int, int], torch.dtype]:
    """Sizes of a program's images as it takes them, its batch first, and their number type."""
    names = set(program.graph_signature.user_inputs)
    values = [exported_value(node) for node in program.graph.nodes if is_input(node) and node.name in names]
    if len(values) != 1 or values[0].dim() != 4:
        found = ", ".join(str(tuple(value.shape)) for value in values) or "none"
        raise ModelError(f"{source.text}: one input of images (N, C, H, W) is needed, the program has {found}")
    dtype = values[0].dtype
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise ModelError(f"{source.text}: the input is {dtype}; images in {', '.join(DTYPES)} are known")
    sizes = [size if isinstance(size, int) else None for size in values[0].shape]
    if None in sizes[1:]:
        raise ModelError(f"{source.text}: the program's image size {tuple(values[0].shape)} is dynamic; export it for one size")
    return (sizes[0] or 2, sizes[1] or 0, sizes[2] or 0, sizes[3] or 0), dtype


def _keep_tensors(graph: fx.GraphModule, source: Source) -> None:
    """Leave out what a program returns as None; `ModelError` for other outputs that are no tensors."""
    end = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    found: Any = end.args[0] if isinstance(end.args[0], tuple | list) else (end.args[0],)
    kept = tuple(one for one in found if one is not None)
    for place, one in enumerate(found):
        if one is not None and not isinstance(one, fx.Node):
            raise ModelError(f"{source.text}: output {place} is {one!r}; outputs must be tensors")
    if not kept:
        raise ModelError(f"{source.text}: it returns no tensor")
    end.args = (kept[0] if len(kept) == 1 else kept,)
    graph.recompile()


def _check(graph: fx.GraphModule, source: Source) -> None:
    if sum(map(is_input, graph.graph.nodes)) != 1:
        raise ModelError(f"{source.text}: one input of images (N, C, H, W) is needed")
    for node in output_nodes(graph.graph):
        if not is_tensor(node):
            raise ModelError(f"{source.text}: the output {node} is not a tensor")
    for name, tensor in graph.named_buffers():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise ModelError(f"{source.text}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")
