"""What a hostile case is, and the table of the functions that make them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
QUICK = ("--set", "synthesis.method=noise", "--set", "synthesis.count=2", "--set", "synthesis.held_out=2", "--no-estimate")
HUGE = (10**12, 10**9, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)


CLOSED = "|"  # in place of a file: a pipe that nobody reads


@dataclass(frozen=True)
class Case:
    """Arguments of the command line, or a call of the Python API; `title` says what is hostile in it."""

    title: str
    work: tuple[str, ...] | Callable[[], object]
    out: str = ""  # a file in place of a standard output that is read


Maker = Callable[[Random, Path], Case]
MAKERS: dict[str, list[Maker]] = {}


def hostile(family: str) -> Callable[[Maker], Maker]:
    """Enter a function that makes a case, in an empty folder of its own, into a family."""

    def enter(maker: Maker) -> Maker:
        MAKERS.setdefault(family, []).append(maker)
        return maker

    return enter


SHARES = {"onnx": 50, "data": 22, "options": 18, "api": 6, "pt2": 4}  # of a hundred cases


def makers(seed: int, count: int) -> Iterator[tuple[int, str, Maker, Random]]:
    """Case by case its number, its family, its maker and its own source of randomness: the same whatever runs before it."""
    families = [family for family, share in SHARES.items() for _ in range(share)]
    for number in range(count):
        random = Random(zlib.crc32(f"{seed}/{number}".encode()))
        family = random.choice(families)
        yield number, family, random.choice(MAKERS[family]), random
