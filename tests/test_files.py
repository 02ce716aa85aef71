"""A result is there whole or not at all, and an impossible one is refused before the work."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dreamquant.files
from dreamquant.errors import OutputError
from dreamquant.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_output,
    check_output_folder,
    in_use,
    make_run_folder,
    remove_stale,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_only_after_the_block(tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    with atomic_path(destination) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"
        temporary.write_bytes(b"new")
        assert not destination.exists()
    assert destination.read_bytes() == b"new"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    destination = tmp_path / "model.onnx"
    destination.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(destination) as temporary:
            temporary.write_bytes(b"half of the new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert destination.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    destination = tmp_path / "model.onnx"
    destination.write_bytes(b"old")

    def fill() -> None:
        with atomic_path(destination), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OutputError, match=r"model\.onnx: the disk filled up"):
        fill()
    assert destination.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_is_known_in_other_words(tmp_path: Path, error: Exception) -> None:
    def fill() -> None:
        with atomic_path(tmp_path / "out"):
            raise error

    with pytest.raises(OutputError, match="the disk filled up"):
        fill()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("free", "expected"), [(0, OutputError), (10**9, RuntimeError)])
def test_a_full_disk_is_known_without_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: type[Exception]
) -> None:
    """As torch.save tells it."""

    def fill() -> None:
        with atomic_path(tmp_path / "out"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(expected):
        fill()
    assert names(tmp_path) == []


def test_an_unrelated_system_error_stays_what_it_is(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "out"):
            (tmp_path / "absent").read_bytes()

    with pytest.raises(FileNotFoundError):
        fail()


def test_permissions_are_those_of_a_plain_file_or_of_the_replaced_one(tmp_path: Path) -> None:
    plain, new, old = tmp_path / "plain", tmp_path / "new", tmp_path / "old"
    plain.touch()
    atomic_write(new, b"1")
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    old.touch()
    old.chmod(0o640)
    atomic_write(old, b"1")
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_a_symlink_stays_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    atomic_write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["target"]


def test_writing_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="absent"):
        atomic_write(tmp_path / "absent" / "out", b"")


def test_what_can_be_written_passes_and_nothing_is_left(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_bytes(b"old")
    check_output(tmp_path / "new", inputs=[existing], need_bytes=1)
    check_output(existing, inputs=[tmp_path / "another", tmp_path])
    assert names(tmp_path) == ["existing"]
    assert existing.read_bytes() == b"old"


def test_impossible_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "absent" / "out": "the folder .*absent does not exist",
        file / "out": ".*file is not a folder",
        tmp_path: "it is a folder, and a file is to be written",
        tmp_path / "pipe": "it is a device or a pipe",
        tmp_path / ("x" * 300): "file name too long",
    }
    for destination, reason in cases.items():
        with pytest.raises(OutputError, match=f"(?i)^cannot write .*: {reason}") as caught:
            check_output(destination)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(tmp_path / "out")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("how", ["itself", "symlink", "hard link", "through a folder's symlink"])
def test_the_output_may_not_be_an_input(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    model = folder / "model.onnx"
    model.write_bytes(b"precious")
    destination = {
        "itself": folder / ".." / "folder" / "model.onnx",
        "symlink": tmp_path / "link.onnx",
        "hard link": tmp_path / "hard.onnx",
        "through a folder's symlink": tmp_path / "again" / "model.onnx",
    }[how]
    (tmp_path / "link.onnx").symlink_to(model)
    (tmp_path / "hard.onnx").hardlink_to(model)
    (tmp_path / "again").symlink_to(folder)
    with pytest.raises(OutputError, match=r"it is the input .*model\.onnx, which would be overwritten"):
        check_output(destination, inputs=[tmp_path / "other", model])


def test_too_little_disk_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"1,000,000,000,000\.0 MB are needed and [\d,]+\.\d MB are free"):
        check_output(tmp_path / "out", need_bytes=10**18)


def nothing_foreign(folder: Path) -> str:
    return ""


def test_the_folder_is_there_only_after_the_block(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    check_output_folder(destination, foreign=nothing_foreign)
    with atomic_folder(destination) as folder:
        (folder / "a").write_bytes(b"new")
        assert not destination.exists()
    assert (destination / "a").read_bytes() == b"new"
    with atomic_folder(destination) as folder:
        (folder / "b").write_bytes(b"newer")
    assert names(destination) == ["b"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "old").touch()
    with pytest.raises(type(error)), atomic_folder(destination):
        raise error
    assert names(destination) == ["old"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "old").touch()
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if not (path / "new").exists():
            return real(path, target)
        raise error

    monkeypatch.setattr(Path, "rename", rename)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_folder(destination) as folder:
        (folder / "new").touch()
    assert names(destination) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_full_disk_in_a_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk filled up"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_impossible_places_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    cases = {
        tmp_path / "nowhere" / "out": "the folder .*nowhere does not exist",
        tmp_path / "file" / "out": ".*file is not a folder",
        tmp_path / "file": "it is a file",
        tmp_path / "full": "it is a folder that holds notes, which would be lost",
        Path.cwd().parent: "it is the working folder",
    }
    for destination, reason in cases.items():
        with pytest.raises(OutputError, match=f"^cannot write .*: {reason}"):
            check_output_folder(destination, foreign=lambda _: "notes")
    assert names(tmp_path) == ["file", "full"]


# ---- what a dead run leaves


KILLED = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("dreamquant")  # without all that the real one imports
package.__path__ = [sys.argv[2]]
sys.modules["dreamquant"] = package
from dreamquant.files import atomic_folder, atomic_path, in_use
with in_use(Path(sys.argv[1])), atomic_path(Path(sys.argv[1]) / "a.onnx") as file, atomic_folder(Path(sys.argv[1]) / "b") as folder:
    file.write_bytes(b"half")
    (folder / "half").write_bytes(b"half")
    print("now", flush=True)
    time.sleep(60)
"""


def test_what_a_live_run_writes_stays_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path, Path(dreamquant.files.__file__).parent], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "now\n"
        left = names(tmp_path)
        assert len(left) == 3
        with pytest.raises(OutputError, match=f"in use by another run .process {other.pid}"), in_use(tmp_path):
            pass
        for look in (remove_stale, make_run_folder, lambda folder: check_output(folder / "c.onnx")):
            look(tmp_path)
            assert names(tmp_path) == left
        other.send_signal(signal.SIGKILL)
        other.wait()
    with in_use(tmp_path):  # the dead run's mark counts no more
        assert names(tmp_path) == [".dreamquant-in-use"]
    assert names(tmp_path) == []


def test_nothing_else_is_swept_up(tmp_path: Path) -> None:
    kept = [".dreamquant-0123", ".dreamquant-old-0123", "dreamquant-tmp-0123", "model.onnx"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".dreamquant-tmp-0123").write_bytes(b"nobody's")
    with atomic_path(tmp_path / "a.onnx") as temporary:
        remove_stale(tmp_path)
        assert names(tmp_path) == sorted([*kept, temporary.name])


def test_a_run_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with in_use(folder):
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), in_use(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()  # there was nothing in it
    with in_use(folder):
        (folder / "result.json").write_bytes(b"{}")
    assert names(folder) == ["result.json"]


def test_where_files_cannot_be_locked_nothing_is_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamquant.files._lock", lambda _: None)
    (tmp_path / ".dreamquant-tmp-0123").write_bytes(b"perhaps another machine's")
    atomic_write(tmp_path / "a", b"mine")
    remove_stale(tmp_path)
    assert names(tmp_path) == [".dreamquant-tmp-0123", "a"]
