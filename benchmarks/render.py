"""Put the tables of all results into `docs/benchmarks.md`, between the lines that name them.

    python -m benchmarks.render            # write them
    python -m benchmarks.render --check    # say what is out of step, exit status 1

A table stands between `<!-- table: SUITE -->` and `<!-- end -->`; SUITE is a suite of `benchmarks.run`, `trust test`, or
`dreamers SUITE BITS...` for a suite of `benchmarks/dreamers.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import dreamers, trust
from benchmarks.run import RESULTS
from benchmarks.suites import SUITES
from benchmarks.tables import table
from dreamquant.files import atomic_write

PAGES = (Path(__file__).parent.parent / "docs" / "benchmarks.md",)
BLOCK = re.compile(r"<!-- table: (?P<name>[^>]+?) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    stale = [page for page in PAGES if rendered(page.read_text()) != page.read_text()]
    if given.check:
        sys.exit("\n".join(f"{page} is out of step: run python -m benchmarks.render" for page in stale) or 0)
    for page in stale:
        atomic_write(page, rendered(page.read_text()).encode())


def rendered(text: str) -> str:
    """The page with every table as the results are now."""
    return BLOCK.sub(lambda found: f"<!-- table: {found['name']} -->\n\n{made(found['name'])}\n\n<!-- end -->", text)


def made(name: str) -> str:
    """One table, by its name."""
    suite, *words = name.split()
    if name == "trust test":
        return trust.tested(trust.measured())
    if suite == "dreamers":
        return dreamers.table(words[0], words[1:])
    if suite not in SUITES:
        raise SystemExit(f"no table {name!r} (known: {', '.join(SUITES)}, trust test, dreamers SUITE BITS...)")
    place = RESULTS / f"{suite}.jsonl"
    return table([json.loads(line) for line in place.read_text().splitlines()] if place.exists() else [])


if __name__ == "__main__":
    main()
