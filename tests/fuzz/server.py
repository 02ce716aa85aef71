"""One case, one process: forked from one that has imported everything, watched, measured, and ended where it goes too far."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import CLOSED

from dreamquant.cli import main
from dreamquant.errors import DreamQuantError, printable

SECONDS, BYTES = 60, 4 * 2**30
LOADED = 4  # how many times as long a case may take by the wall, where other work takes the processor
_TICK, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
_BACKSTOP = 24 * 2**30  # of address space: a process that grows faster than it is looked at

GOOD = ("refused", "fine")
FAULTS = ("traceback", "crash", "hang", "memory", "lines", "status", "left behind")


@dataclass(frozen=True)
class Outcome:
    """What a case came to: one of `GOOD` or of `FAULTS`, with what it wrote, the seconds it took and the bytes it held."""

    kind: str
    err: str
    out: str
    seconds: float
    bytes: int

    @property
    def good(self) -> bool:
        return self.kind in GOOD


def run(work: tuple[str, ...] | Callable[[], object], folder: Path, *, out: str = "") -> Outcome:
    """Run a command line or a call in a process of its own, with `folder` as the working folder."""
    streams = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(work, folder, out or str(streams[0]), str(streams[1]))
    ended, stopped = _watch(child, began)
    _, status, usage = ended
    seconds = time.monotonic() - began
    text, error = (path.read_bytes() if path.exists() else b"" for path in streams)
    for path in streams:
        path.unlink(missing_ok=True)
    kind = stopped or _kind(status, error, folder)
    return Outcome(kind, error.decode(errors="backslashreplace"), text.decode(errors="replace"), seconds, usage.ru_maxrss * 1024)


def _child(work: tuple[str, ...] | Callable[[], object], folder: Path, out: str, err: str) -> None:
    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_BACKSTOP, _BACKSTOP))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))  # where nobody watches any more
        os.chdir(folder)
        os.setpgid(0, 0)
        for number, path in ((1, out), (2, err)):
            os.dup2(_closed_pipe() if path == CLOSED else os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True)
        warnings.resetwarnings()
        code = _called(work)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def _called(work: tuple[str, ...] | Callable[[], object]) -> int:
    if callable(work):
        try:
            work()
        except DreamQuantError as error:
            sys.stderr.write(f"dreamquant: {printable(str(error))}\n")
            return 2
        return 0
    sys.argv = ["dreamquant", *work]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _watch(child: int, began: float) -> tuple[tuple[int, int, resource.struct_rusage], str]:
    """Wait for the child; end it where it takes too long or too much, and say which."""
    stopped = ""
    while True:
        found = os.wait4(child, os.WNOHANG)
        if found[0]:
            return found, stopped
        if not stopped:
            stopped = _too_far(child, began)
            if stopped:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def _too_far(child: int, began: float) -> str:
    try:
        held = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * _PAGE
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return ""
    worked = (int(fields[11]) + int(fields[12])) / _TICK
    if held > BYTES:
        return "memory"
    return "hang" if worked > SECONDS or time.monotonic() - began > LOADED * SECONDS else ""


def _kind(status: int, error: bytes, folder: Path) -> str:
    if os.WIFSIGNALED(status):
        return "crash"
    text = error.decode(errors="backslashreplace")
    if "Traceback (most recent call last)" in text:
        return "traceback"
    code = os.WEXITSTATUS(status)
    if code not in (0, 2):
        return "status"
    if any(folder.rglob(".dreamquant-*")):
        return "left behind"
    lines = text.splitlines()
    if code == 2:
        return "refused" if len(lines) == 1 and lines[0].startswith("dreamquant: ") and lines[0].isprintable() else "lines"
    return "fine" if len(lines) <= 1 and text.removesuffix("\n").isprintable() else "lines"
