"""Results are written whole or not at all, and whether they can be written is known before the work begins."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dreamquant.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = os.strerror(errno.ENOSPC).lower()  # all that a library keeps when it wraps the system's error in its own
_NOTHING_LEFT = 64 * 1024  # bytes
_TEMPORARY = ".dreamquant-tmp-"  # begins the name of what is locked for as long as somebody writes it, and is nobody's after that
_IN_USE = ".dreamquant-in-use"  # locked for as long as a run works in its folder; holds its process id


@contextmanager
def atomic_path(destination: Path) -> Iterator[Path]:
    """An empty temporary file to write into, with `destination`'s suffix and in its folder.

    When the block ends it takes `destination`'s place in one step; when the block raises (Ctrl-C too) it is removed and
    `destination` is as it was. Through a symlink, the file that it points to is the one that is replaced. Raises
    OutputError when the file cannot be created or put in place, or when the disk fills up inside the block.
    """
    place = _real(destination)
    temporary, held = _create_beside(place, destination)
    try:
        yield temporary
        _replace(temporary, place, destination)
    except Exception as error:
        if _is_full(error, place.parent):
            raise OutputError(f"cannot write {destination}: the disk filled up while writing") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        os.close(held)


def atomic_write(destination: Path, data: bytes) -> None:
    """Write `data` to `destination`, whole or not at all; errors as `atomic_path`."""
    with atomic_path(destination) as temporary:
        temporary.write_bytes(data)


def make_run_folder(folder: Path) -> None:
    """Make the folder, and those above it, that a run keeps its state in; `OutputError` where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the run folder {folder}: {error.strerror}") from error
    remove_stale(folder)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep a run folder, which is made, for one run alone; `OutputError` where another works in it.

    The mark of a run that died counts no more: the system takes its lock away with it.
    """
    place, new = folder / _IN_USE, not folder.exists()
    make_run_folder(folder)
    try:
        held = _hold(place)
        if held is None:
            owner = place.read_text().strip()
            raise OutputError(f"the run folder {folder} is in use by another run (process {owner or 'unknown'})")
        os.ftruncate(held, 0)
        os.write(held, str(os.getpid()).encode())
    except OSError as error:
        raise OutputError(f"cannot write in the run folder {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(held)
        if new:
            with suppress(OSError):  # unless there is something in it
                folder.rmdir()


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders in a folder that writers left there when they died, and no others."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name.startswith(_TEMPORARY)]:
            held = _hold(path, make=False, surely=True)
            if held is not None:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                os.close(held)


def check_output(destination: Path, *, inputs: Iterable[Path] = (), need_bytes: int = 0) -> None:
    """Raise OutputError, in one sentence, when `destination` could not be written.

    Its folder must exist and take a new file, it must not be a folder or a device, must not be one of `inputs` (seen
    through symlinks and hard links), and its disk must have `need_bytes` free.
    """
    place = _real(destination)
    try:
        reason = _unfit(place) or _same_as_input(place, inputs) or _too_full(place, need_bytes)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}") from error
    if reason:
        raise OutputError(f"cannot write {destination}: {reason}")
    remove_stale(place.parent)
    temporary, held = _create_beside(place, destination)
    temporary.unlink()
    os.close(held)


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """An empty temporary folder to fill, beside `destination`.

    When the block ends it takes `destination`'s place, and a folder that was there is removed with all that is in it: ask
    `check_output_folder` before. When the block raises (Ctrl-C too) the temporary folder is removed and `destination` is as
    it was. Raises OutputError when the folder cannot be created or put in place, or when the disk fills up inside the block.
    """
    place = _real(destination)
    temporary, held = _create_folder_beside(place, destination)
    try:
        yield temporary
        _replace_folder(temporary, place, destination)
    except Exception as error:
        if _is_full(error, place.parent):
            raise OutputError(f"cannot write {destination}: the disk filled up while writing") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def check_output_folder(destination: Path, *, foreign: Callable[[Path], str]) -> None:
    """Raise OutputError, in one sentence, when `destination` could not be written as a folder.

    The folder around it must exist and take a new one. What is at `destination` already must be a folder, not the working
    folder, and hold nothing that must be kept: `foreign` gives the name of such a thing, or "".
    """
    place = _real(destination)
    try:
        reason = _unfit_folder(place, foreign)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}") from error
    if reason:
        raise OutputError(f"cannot write {destination}: {reason}")
    remove_stale(place.parent)
    temporary, held = _create_folder_beside(place, destination)
    temporary.rmdir()
    os.close(held)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _no_folder(folder: Path) -> str:
    if not folder.exists():
        return f"the folder {folder} does not exist"
    return "" if folder.is_dir() else f"{folder} is not a folder"


def _unfit_folder(place: Path, foreign: Callable[[Path], str]) -> str:
    if not place.exists():
        return _no_folder(place.parent)
    if not place.is_dir():
        return "it is a file, and a folder is to be written"
    if Path.cwd().is_relative_to(place):
        return "it is the working folder, which cannot be replaced"
    kept = foreign(place)
    return f"it is a folder that holds {kept}, which would be lost; give a new or an empty one" if kept else ""


def _unfit(place: Path) -> str:
    missing = _no_folder(place.parent)
    if missing:
        return missing
    if place.is_dir():
        return "it is a folder, and a file is to be written"
    if place.exists() and not place.is_file():
        return "it is a device or a pipe, and a file is to be written"
    return ""


def _same_as_input(place: Path, inputs: Iterable[Path]) -> str:
    for given in inputs:
        real = _real(given)
        if real == place or (real.exists() and place.exists() and real.samefile(place)):
            return f"it is the input {given}, which would be overwritten"
    return ""


def _too_full(place: Path, need_bytes: int) -> str:
    free = shutil.disk_usage(place.parent).free
    if free < need_bytes:
        return f"{_megabytes(need_bytes)} are needed and {_megabytes(free)} are free on the disk of {place.parent}"
    return ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _create_beside(place: Path, destination: Path) -> tuple[Path, int]:
    """A new empty file in `place`'s folder, with the permissions a plain `open` gives it, and the descriptor that locks it."""
    temporary = place.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}{place.suffix[:32]}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return temporary, _held(temporary)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {place.parent}: {error.strerror}") from error


def _create_folder_beside(place: Path, destination: Path) -> tuple[Path, int]:
    """A new empty folder in `place`'s folder, and the descriptor that locks it."""
    temporary = place.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}")
    try:
        temporary.mkdir()
        return temporary, _held(temporary)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {place.parent}: {error.strerror}") from error


def _held(temporary: Path) -> int:
    held = _hold(temporary, make=False)
    if held is None:  # somebody who swept up found it before it was locked
        raise FileNotFoundError(errno.ENOENT, "a temporary file was removed while it was made")
    return held


def _hold(path: Path, *, make: bool = True, surely: bool = False) -> int | None:
    """A descriptor that locks the file or folder at `path` until it is closed or the process ends; None where another has it.

    Where files cannot be locked it locks nothing, or, `surely`, there is none.
    """
    while True:
        try:
            kind = os.O_RDONLY if path.is_dir() else os.O_RDWR | (os.O_CREAT if make else 0)
            descriptor = os.open(path, kind, 0o666)
        except FileNotFoundError:
            if make:
                raise
            return None
        locked = _lock(descriptor)
        if locked is False or (surely and locked is None):
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last owner has removed it meanwhile
        if not make:
            return None


def _lock(descriptor: int) -> bool | None:
    """Lock a file or folder; False where somebody else has, None where the system or the disk knows no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _replace_folder(temporary: Path, place: Path, destination: Path) -> None:
    old = place.with_name(f".dreamquant-old-{secrets.token_hex(6)}")  # not swept up: it may be all that is left
    try:
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            if place.exists():
                shutil.copymode(place, temporary)
                place.rename(old)
            temporary.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)


def _replace(temporary: Path, place: Path, destination: Path) -> None:
    try:
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if place.exists():
            shutil.copymode(place, temporary)
        temporary.replace(place)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}") from error


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OutputError):
        return False
    if (isinstance(error, OSError) and error.errno in _FULL) or _FULL_TEXT in str(error).lower():
        return True
    # torch.save keeps nothing of the system's reason: what is left on the disk tells
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _NOTHING_LEFT
