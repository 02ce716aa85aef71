"""What a run keeps so that it can go on: tensors in a file, with what they were made by.

A file counts only where it was made by the same settings, versions and number of threads, and is as it was written; anything
else is as if there were no file, and is told where a person might wonder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dreamquant.files import atomic_write

log = logging.getLogger("dreamquant")


def circumstances() -> dict[str, str]:
    """What bits depend on beside settings and seed: versions, and the number of threads that sums are shared out to."""
    return {"dreamquant": version("dreamquant"), "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def keep(path: Path, tensors: Mapping[str, Tensor], made_by: str) -> None:
    """Write tensors, whole or not at all."""
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    metadata = {"made_by": made_by, "made_with": json.dumps(circumstances()), "checksum": digest(plain)}
    atomic_write(path, save(plain, metadata))


def kept(path: Path, made_by: str) -> dict[str, Tensor] | None:
    """The tensors in `path` if they were made by exactly this, under these circumstances; else None.

    A damaged file, and one of other circumstances, is told as a warning.
    """
    if not os.path.lexists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("made_by") != made_by:
                return None
            other = _differences(json.loads(metadata.get("made_with", "{}")))
            tensors = {} if other else {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dict
    except Exception as error:  # whatever the broken bytes lead to
        log.warning("%s is damaged (%s) and is made anew", path, " ".join(str(error).split()) or type(error).__name__)
        return None
    if other:
        log.warning("%s was made with %s, and is made anew", path, other)
        return None
    if digest(tensors) != metadata.get("checksum"):
        log.warning("%s is damaged (it does not have the checksum that it was stored with) and is made anew", path)
        return None
    return tensors


def _differences(made_with: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} {made_with.get(name, 'unknown')} where this run has {value}"
        for name, value in circumstances().items()
        if made_with.get(name) != value
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A text that tells tensors, and their names, types and shapes, apart."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
