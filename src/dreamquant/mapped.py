"""Tensors of many images: in files that memory maps, where they are large, so that only those in use take room in it."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import OutputError
from dreamquant.limits import memory

ROOM = 128 * 2**20  # bytes of a tensor that memory holds ...
PART = 16 * 2**20  # bytes of images that are looked at together
PARTS = 8  # ... or such a part of the limit, where that is less
_maps: list[weakref.ref[mmap.mmap]] = []


def room(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of undefined numbers: in memory, or a large one in a temporary file, which goes with it.

    Raises `OutputError` where the disk has no room for it.
    """
    size = dtype.itemsize * math.prod(shape)
    if size <= min(ROOM, memory() // PARTS):
        return torch.empty(tuple(shape), dtype=dtype, device=CPU)
    with tempfile.TemporaryFile(prefix="dreamquant-") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a hole would be found out about where it is written into
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        except OSError as error:
            raise OutputError(f"{tuple(shape)} numbers, {size / 1e9:.1f} GB, find no room in {tempfile.gettempdir()}") from error
        buffer = mmap.mmap(file.fileno(), size)
    _maps[:] = [one for one in _maps if one() is not None]
    _maps.append(weakref.ref(buffer))
    return torch.frombuffer(buffer, dtype=dtype).view(tuple(shape))


class Pieces(Sequence[Tensor]):
    """Images (N, C, H, W), `size` at once, on `device`. Those that lie in files leave memory as the pieces go by, and so does
    what was freed: after the last, and wherever it has come to `ROOM`."""

    def __init__(self, images: Tensor, size: int, device: torch.device | None = None) -> None:
        self._pieces = torch.split(images, size)
        self._device = images.device if device is None else device

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, place: Any) -> Any:
        return self._pieces[place].to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        held = _resident()
        for piece in self._pieces:
            yield piece.to(self._device)
            _unmap()
            if _resident() - held > ROOM:
                put_away()
                held = _resident()
        if len(self) > 1:
            put_away()


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of the same images, as many images at once as take `PART` bytes."""
    size = max((tensor.numel() * tensor.element_size() // max(len(tensor), 1) for tensor in tensors), default=0)
    return zip(*(Pieces(tensor, max(1, PART // max(size, 1))) for tensor in tensors), strict=True)


def put_away() -> None:
    """Let what is mapped from files go out of memory until it is looked at again, and return to the system what was freed: the C
    library keeps it, and the next stage's blocks may not fit into the gaps."""
    _unmap()
    trim = _trim()
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Bytes of memory that the process has, where the system tells it; else 0."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _unmap() -> None:
    for one in _maps:
        buffer = one()
        if buffer is not None:
            buffer.madvise(mmap.MADV_DONTNEED)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found
