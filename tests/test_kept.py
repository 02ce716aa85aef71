"""What a run keeps is used where it is whole and was made alike; otherwise it is as if it were not there, and that is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dreamquant.kept import circumstances, digest, keep, kept

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "steps": torch.tensor(3),
    "none": torch.empty(0, 2),
    "bits": torch.tensor([True]),
}
NOISE = np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8).tobytes()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    keep(tmp_path / "kept.safetensors", TENSORS, "this")
    return tmp_path / "kept.safetensors"


def test_what_was_kept(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = kept(place, "this")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert kept(place, "that") is None
    assert kept(place.with_name("absent"), "this") is None
    assert not [record for record in caplog.records if record.name == "dreamquant"]


def test_tensors_come_back_as_they_are_counted(tmp_path: Path) -> None:
    keep(tmp_path / "a", {"images": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)}, "this")
    found = kept(tmp_path / "a", "this")
    assert found is not None
    assert found["images"].stride() == (60, 20, 5, 1)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "its header alone": lambda data: data[:40],
    "empty": lambda _: b"",
    "random": lambda _: NOISE,
    "one bit": lambda data: data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
    "another name": lambda data: data.replace(b"weight", b"thgiew"),
    "another shape": lambda data: data.replace(b"[2,3]", b"[3,2]"),
    "another checksum": lambda data: data.replace(digest(TENSORS).encode(), b"0" * 64),
    "no circumstances": lambda _: save(TENSORS, {"made_by": "this", "made_with": "[1", "checksum": digest(TENSORS)}),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_damage_is_told(kind: str, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = DAMAGES[kind](place.read_bytes())
    assert damaged != place.read_bytes()
    place.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert kept(place, "this") is None
    assert [record.getMessage().startswith(f"{place} is damaged (") for record in caplog.records] == [True]
    assert "\n" not in caplog.records[0].getMessage()


def test_a_folder_in_its_place_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert kept(tmp_path, "this") is None
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("name", ["dreamquant", "torch", "threads"])
def test_other_circumstances_are_told(
    name: str, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = circumstances() | {name: "0"}
    monkeypatch.setattr("dreamquant.kept.circumstances", lambda: now)
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert kept(place, "this") is None
    assert f"{name} {circumstances()[name]} where this run has 0" in caplog.text


def test_one_without_circumstances_is_another_version_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "old").write_bytes(save(TENSORS, {"made_by": "this"}))
    with caplog.at_level(logging.WARNING, logger="dreamquant"):
        assert kept(tmp_path / "old", "this") is None
    assert "dreamquant unknown where this run has" in caplog.text


def test_digests_tell_names_types_and_shapes_apart() -> None:
    one = torch.zeros(4)
    others = [{"a": one}, {"b": one}, {"a": one.view(2, 2)}, {"a": one.int()}, {"a": -one}, {"a": one, "b": one}, {}]
    assert len({digest(tensors) for tensors in others}) == len(others)
