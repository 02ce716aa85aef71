"""How much memory may be asked for: told from sizes, before anything is allocated.

The limit is the process's: half of the machine's memory, `DREAMQUANT_MEMORY` in GiB, or what `memory_limit` says (`--memory`).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dreamquant.errors import DreamQuantError, OptionError

GIB = 2**30
LARGEST = 2**20  # GiB: what no machine has
LARGEST_COUNT = 10**9  # of images, steps, epochs: what no run comes to the end of
VARIABLE = "DREAMQUANT_MEMORY"
_chosen: list[int] = []


def memory() -> int:
    """The limit in bytes; `OptionError` where the environment says something that is no size."""
    if not _chosen:
        given = os.environ.get(VARIABLE, "")
        _chosen.append(_bytes(given, VARIABLE) if given else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return _chosen[0]


@contextmanager
def memory_limit(gib: float) -> Iterator[None]:
    """Another limit, in GiB, for a while. ONNX Runtime keeps to the one that the first file of the process was run under."""
    before = list(_chosen)
    _chosen[:] = [_bytes(gib, "memory")]
    try:
        yield
    finally:
        _chosen[:] = before


def _bytes(given: str | float, name: str) -> int:
    try:
        gib = float(given)
    except ValueError:
        gib = math.nan
    if not 0 < gib <= LARGEST:
        raise OptionError(f"{name} is {given}; it must be a number of GiB above 0, as in 4")
    return int(gib * GIB)


def check_memory(needed: int, what: str, kind: type[DreamQuantError]) -> None:
    """Raise an error of `kind` where `what`, which is about to be made, needs more bytes than the limit."""
    if needed > memory():
        raise kind(f"{what}: {shown(needed)} of memory would be needed, the limit is {shown(memory())} (--memory, in GiB)")


def shown(size: int) -> str:
    """Bytes as GiB."""
    gib = size / GIB
    return f"{gib:.3g} GiB" if gib < 1000 else f"{gib:,.0f} GiB" if gib < 1e9 else "more than 10^9 GiB"


def check_archive(archive: zipfile.ZipFile, names: Iterable[str], where: str, kind: type[DreamQuantError]) -> None:
    """`check_memory` of what members of a zip file unpack to."""
    check_memory(sum(archive.getinfo(name).file_size for name in names), f"{where} unpacked", kind)
