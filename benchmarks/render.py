"""Put the tables of all results into the README and the pages of `docs/`, between the lines that name them.

    python -m benchmarks.render            # write them
    python -m benchmarks.render --check    # say what is out of step, exit status 1

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is

    SUITE [WORD ...]                     rows of a suite of `benchmarks.run`: those that have each word in network, label or bits
    SUITE [WORD ...]: LABEL | LABEL ...  their top-1, a column a label; lines with one label alone are left out
    dreamers SUITE BITS... [: LABEL | LABEL ...]    lines of a suite of `benchmarks/dreamers.py`
    granularity_latency, trust test, summary BITS, zoo, zoo first, zoo distance, zoo cost, input_spaces
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import dreamers, input_spaces, trust
from benchmarks.run import RESULTS
from benchmarks.suites import SUITES
from benchmarks.tables import Row, summary, table
from benchmarks.zoo_tables import tables
from dreamquant.files import atomic_write

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "benchmarks.md", DOCS / "input.md", *sorted((DOCS / "reproduction").glob("*.md")))
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
    chosen, _, listed = name.partition(": ")
    suite, *words = chosen.split()
    labels = listed.split(" | ") if listed else []
    if name == "trust test":
        return trust.tested(trust.measured())
    if suite == "summary":
        rows = [row for suite in ("auto", "digits") for row in rows_of(suite) if row["recipe"]["name"] == "auto"]
        return summary(
            [row for row in rows if row["bits"] in words],
            with_default_settings("noise"),
            with_default_settings("real"),
        )
    if name == "granularity_latency":
        return latencies(rows_of(suite))
    if suite == "dreamers":
        head, rule, *lines = dreamers.table(words[0], words[1:]).splitlines()
        return "\n".join([head, rule, *(line for line in lines if not labels or first_cell(line) in labels)])
    if name == "input_spaces":
        return input_spaces.table(rows_of(name))
    if suite == "zoo":
        return tables(rows_of(suite), words)
    if suite not in SUITES:
        known = f"{', '.join(SUITES)}, granularity_latency, trust test, summary, zoo, dreamers SUITE BITS..."
        raise SystemExit(f"no table {name!r} (known: {known})")
    rows = [row for row in rows_of(suite) if all(word in f"{row['model']} {row['label']} {row['bits']}" for word in words)]
    return side_by_side(rows, labels) if labels else table(rows)


def with_default_settings(images: str) -> list[Row]:
    """Rows of the default recipe's settings on other images: at 8 bits nothing is learnt but ranges."""
    methods = {"W8A8": "nearest", "W4A4": "qdrop"}
    return [row for row in rows_of("reference") if row["label"].split(",")[0] == f"{methods[row['bits']]} on {images}"]


def rows_of(results: str) -> list[Row]:
    place = RESULTS / f"{results}.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def first_cell(line: str) -> str:
    return line.split("|")[1].strip()


def side_by_side(rows: list[Row], labels: list[str]) -> str:
    """Top-1 by network and bits, a column a label, so that ways to do the same thing stand beside each other."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["label"] in labels:
            found.setdefault((row["model"], row["bits"]), {}).setdefault(row["label"], []).append(row["top1"])
    lines = [
        f"| {model} | {bits} | {' | '.join(dreamers.spread(cells.get(label, [])) for label in labels)} |"
        for (model, bits), cells in sorted(found.items(), key=lambda one: _order(rows, *one[0]))
        if len(cells) > 1
    ]
    head = [f"| network | bits | {' | '.join(labels)} |", f"|---|---|{'---:|' * len(labels)}"]
    return "\n".join(head + lines) if lines else "No rows yet."


def _order(rows: list[Row], model: str, bits: str) -> tuple[int, ...]:
    """Networks in the order of their first rows, most bits first."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    return models.index(model), *(-int(digit) for digit in re.findall(r"\d+", bits))


def latencies(rows: list[Row]) -> str:
    """Milliseconds of all-tensor, hybrid and all-channel files, and the all-channel file's time over their own."""
    lines = [
        "| processor | network | runtime | file | layers per channel | bytes | ms | speed against all per channel | quartiles |",
        "|---|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        runtime = row["runtime"].partition("-")[0]  # without the build's number
        low, high = row["quartiles"]
        lines.append(
            f"| {row['processor']} "
            f"| {row['model']} | {runtime} | {row['file']} | {row['channel_layers']} of {row['layers']} | {row['bytes']:,}"
            f" | {row['ms']:.3f} | {row['speed_against_channel']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) if rows else "No rows yet."


if __name__ == "__main__":
    main()
