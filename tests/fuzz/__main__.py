"""The fuzzer's command line; see the package."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tests.fuzz import api_calls, data_files, onnx_files, option_texts, pt2_files  # noqa: F401  (each enters its makers)
from tests.fuzz.cases import Case, makers
from tests.fuzz.server import FAULTS, GOOD, Outcome, run

import dreamquant.network.archive
import dreamquant.report  # noqa: F401  (whatever a command imports late is imported before the first fork)
from dreamquant.limits import VARIABLE
from dreamquant.methods import FAMILIES, find_method, method_names

LIMIT = 3  # GiB that a case may ask for; the program itself and what it keeps beside that take the rest of the four


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input, from a seed.")
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop, with success, after so long")
    parser.add_argument("--only", type=int, action="append", help="the numbers of cases to run, and show")
    parser.add_argument("--family", help="one family of cases only")
    parser.add_argument("--faults", type=Path, help="a file to write faults to, case by case")
    return parser.parse_args()


def main() -> int:
    chosen = parsed()
    os.environ[VARIABLE] = str(LIMIT)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for family in FAMILIES:
        for name in method_names(family):
            find_method(family, name)
    began, counts, slowest, largest = time.monotonic(), Counter[str](), 0.0, 0
    faults: list[str] = []
    for number, family, maker, random in makers(chosen.seed, chosen.count):
        if (chosen.only and number not in chosen.only) or (chosen.family and family != chosen.family):
            continue
        if time.monotonic() - began > chosen.seconds:
            break
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            folder.mkdir()
            case = maker(random, folder)
            outcome = run(case.work, folder, out=case.out)
            if chosen.only:
                shown(case, outcome, folder)
        counts[outcome.kind] += 1
        sys.stderr.write(f"\r{number + 1} of {chosen.count}")
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.bytes)
        if not outcome.good:
            faults.append(told(number, family, case, outcome))
            sys.stdout.write(faults[-1] + "\n")
            sys.stdout.flush()
            if chosen.faults:
                chosen.faults.write_text("\n\n".join(faults))
    table = ", ".join(f"{counts[kind]} {kind}" for kind in (*GOOD, *FAULTS))
    sys.stdout.write(f"{sum(counts.values())} cases of seed {chosen.seed}: {table}; ")
    sys.stdout.write(f"slowest {slowest:.1f} s, largest {largest / 2**30:.2f} GiB, {time.monotonic() - began:.0f} s in all\n")
    return 1 if faults else 0


def told(number: int, family: str, case: Case, outcome: Outcome) -> str:
    lines = outcome.err.strip().splitlines()
    tail = "\n    ".join(lines[-8:])
    work = " ".join(case.work)[:300] if isinstance(case.work, tuple) else "a call"
    head = f"case {number} ({family}): {outcome.kind}, {outcome.seconds:.1f} s, {outcome.bytes / 2**30:.2f} GiB: {case.title}"
    return f"{head}\n    {work}\n    {tail}".encode("utf-8", "backslashreplace").decode()


def shown(case: Case, outcome: Outcome, folder: Path) -> None:
    """All of one case; its files stay where DREAMQUANT_FUZZ_KEEP says."""
    keep = os.environ.get("DREAMQUANT_FUZZ_KEEP")
    if keep:
        shutil.copytree(folder, keep, dirs_exist_ok=True)
    text = f"{case.title}: {case.work}\n{outcome.kind} {outcome.seconds:.1f} s {outcome.bytes / 2**30:.2f} GiB\n{outcome.err}\n"
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + outcome.out[:2000])


if __name__ == "__main__":
    sys.exit(main())
