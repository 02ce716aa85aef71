"""Hostile .pt2 files: the bytes of a valid one, changed."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

from tests.fuzz.cases import DIGITS, QUICK, Case, hostile


def case(title: str, random: Random, folder: Path, data: bytes) -> Case:
    (folder / "model.pt2").write_bytes(data)
    commands = (("inspect", "model.pt2"), ("quantize", "model.pt2", "-o", "out.onnx", *QUICK))
    return Case(title, random.choice(commands))


@hostile("pt2")
def flipped(random: Random, folder: Path) -> Case:
    data = bytearray((DIGITS / "digits.pt2").read_bytes())
    for _ in range(random.choice((1, 5, 100))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return case("bits flipped", random, folder, bytes(data))


@hostile("pt2")
def cut(random: Random, folder: Path) -> Case:
    data = (DIGITS / "digits.pt2").read_bytes()
    return case("cut short", random, folder, data[: random.randrange(len(data))])


@hostile("pt2")
def member_changed(random: Random, folder: Path) -> Case:
    """A member left out, emptied, or changed in some bytes, with checksums that are right."""
    made = BytesIO()
    with zipfile.ZipFile(DIGITS / "digits.pt2") as source, zipfile.ZipFile(made, "w") as archive:
        names = source.namelist()
        chosen, kind = random.choice(names), random.choice(("left out", "emptied", "changed", "zeroed"))
        for name in names:
            data = bytearray(source.read(name))
            if name == chosen:
                if kind == "left out":
                    continue
                if kind == "emptied":
                    data.clear()
                elif kind == "zeroed":
                    data[:] = bytes(len(data))
                else:
                    for _ in range(random.choice((1, 3)) if data else 0):
                        data[random.randrange(len(data))] = random.randrange(32, 127)
            archive.writestr(name, bytes(data))
    return case(f"{chosen} {kind}", random, folder, made.getvalue())
