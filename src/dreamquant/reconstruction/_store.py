"""What a reconstruction leaves on disk: units that are done, and tensors that memory has no room for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.files import make_run_folder
from dreamquant.kept import keep, kept
from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import device_of, tensor_of
from dreamquant.quantization.grid import FakeQuantize, Grid
from dreamquant.quantization.walk import Chunks, keep_float, quantizer_of
from dreamquant.reconstruction._units import Unit


class Progress:
    """Units that are done, one file each in `folder` (None: nowhere). `made_by` says what they were learnt with; files of another
    run are not taken."""

    def __init__(self, folder: Path | None, made_by: dict[str, Any]) -> None:
        self.folder = folder
        self.made_by = json.dumps(made_by, sort_keys=True, default=str)
        if folder is not None:
            make_run_folder(folder)

    def keep(self, number: int, unit: Unit) -> None:
        """Write what the student has in this unit."""
        if self.folder is not None:
            keep(self._path(number), _state(unit), self.made_by)

    def restore(self, number: int, unit: Unit) -> bool:
        """Put into the student what an earlier run has written of this unit, if it has."""
        tensors = None if self.folder is None else kept(self._path(number), self.made_by)
        if tensors is not None:
            _put(unit, tensors)
        return tensors is not None

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"unit-{number:03d}.safetensors"


def _state(unit: Unit) -> dict[str, Tensor]:
    found = {f"{node.target}.weight": tensor_of(unit.graph, node.all_input_nodes[0]) for node in unit.weights}
    scales = {f"{node.target}.scale": _scale(unit, str(node.target)) for node in (*unit.weights, *unit.quantizers)}
    return {name: value for name, value in (found | scales).items() if value.numel()}


def _scale(unit: Unit, quantizer: str) -> Tensor:
    module = unit.graph.get_submodule(quantizer)
    grid = module.grid if isinstance(module, FakeQuantize) else None
    return grid.scale if isinstance(grid, Grid) else torch.empty(0, device=CPU)


def _put(unit: Unit, tensors: dict[str, Tensor]) -> None:
    device = device_of(unit.graph)
    tensors = {name: value.to(device) for name, value in tensors.items()}
    for node in unit.weights:
        stored = node.all_input_nodes[0]
        keep_float(unit.graph, stored)
        set_tensor(unit.graph, stored, tensors[f"{node.target}.weight"])
    for node in (*unit.weights, *unit.quantizers):
        quantizer, scale = quantizer_of(unit.graph, node), tensors.get(f"{node.target}.scale")
        if isinstance(quantizer.grid, Grid) and scale is not None:
            quantizer.grid = replace(quantizer.grid, scale=scale)


class Spill:
    """Lists of tensors, kept in memory up to `limit` bytes each, mapped from temporary files beyond it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, chunks: Chunks) -> Chunks:
        if sum(chunk.numel() * chunk.element_size() for chunk in chunks) <= self.limit:
            return chunks
        return [self._mapped(chunk) for chunk in chunks]

    def _mapped(self, chunk: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(prefix="dreamquant-", suffix=".tensor") as file:  # freed with its last mapping
            file.truncate(chunk.numel() * chunk.element_size())
            mapped = torch.from_file(file.name, shared=True, size=chunk.numel(), dtype=chunk.dtype).view(chunk.shape)
        return mapped.copy_(chunk)
