"""Fit the estimate of lost accuracy to all that was measured with labels, and test it on networks left out of the fit.

    python -m benchmarks.trust            # the test as Markdown
    python -m benchmarks.trust --ship     # and write src/dreamquant/assess/trust.json

Takes every row of `benchmarks/results` that holds the answers on probes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import RESULTS, commit
from dreamquant.assess.probes import Probe
from dreamquant.assess.trust import Fit, features, to_scale, trust
from dreamquant.files import atomic_write

SHIPPED = Path(__file__).parent.parent / "src" / "dreamquant" / "assess" / "trust.json"
LEVEL = 90.0
KINDS = ("procedural", "dreamt")


@dataclass(frozen=True)
class Measured:
    """One quantization with its true loss, in percent of the float network's accuracy."""

    suite: str
    model: str
    label: str
    bits: str
    probes: list[Probe]
    learned: bool
    drop: float

    @property
    def network(self) -> str:
        return self.model.removesuffix("_bnfolded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ship", action="store_true", help="write the fit of all cases into the package")
    given = parser.parse_args()
    cases = measured()
    print(tested(cases))
    if given.ship:
        fit = asdict(fitted(cases)) | {"made by": "python -m benchmarks.trust --ship", "commit": commit()}
        atomic_write(SHIPPED, (json.dumps(fit, indent=2) + "\n").encode())


def measured() -> list[Measured]:
    """Every row of the results that holds probes."""
    found = []
    for place in sorted(RESULTS.glob("*.jsonl")):
        for row in map(json.loads, place.read_text().splitlines()):
            if row.get("probes"):
                drop = 100.0 * (1.0 - row["top1"] / row["float_top1"])
                probes = [Probe(**probe) for probe in row["probes"]]
                found.append(Measured(place.stem, row["model"], row.get("label", ""), row["bits"], probes, learnt(row), drop))
    return found


def learnt(row: dict[str, Any]) -> bool:
    """Whether anything but ranges was found on images."""
    stages = row.get("recipe", row)
    return bool(stages.get("training")) or stages["reconstruction"]["method"] != "nearest"


def fitted(cases: list[Measured]) -> Fit:
    """Least squares on the scale of `to_scale`, every network with the same say; the interval is that of the test below."""
    below, above = np.quantile(residuals(cases), [(100 - LEVEL) / 200, (100 + LEVEL) / 200])
    ranges = {
        kind: (min(case.probes[i].kl for case in cases), max(case.probes[i].kl for case in cases)) for i, kind in enumerate(KINDS)
    }
    networks = len({case.network for case in cases})
    return Fit(weights_of(cases), float(below), float(above), LEVEL, len(cases), networks, ranges)


def weights_of(cases: list[Measured]) -> list[float]:
    shares = {name: sum(case.network == name for case in cases) for name in {case.network for case in cases}}
    say = np.array([1.0 / np.sqrt(shares[case.network]) for case in cases])
    table = np.array([features(case.probes, learned=case.learned) for case in cases])
    values = np.array([to_scale(case.drop) for case in cases])
    return [float(weight) for weight in np.linalg.lstsq(table * say[:, None], values * say, rcond=None)[0]]


def residuals(cases: list[Measured]) -> list[float]:
    """What the fit of all other networks leaves unexplained in each case."""
    found = []
    for case in cases:
        weights = weights_of([other for other in cases if other.network != case.network])
        found.append(to_scale(case.drop) - float(np.dot(weights, features(case.probes, learned=case.learned))))
    return found


def tested(cases: list[Measured]) -> str:
    """Leave one network out: the fit and its interval are of the others only."""
    lines = [
        "| network left out | cases | mean error | median error | in the interval | mean width | largest loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    whole: list[tuple[float, bool, float]] = []
    for name in dict.fromkeys(case.network for case in cases):
        fit = fitted([case for case in cases if case.network != name])
        mine = [case for case in cases if case.network == name]
        told = [(case, trust(case.probes, learned=case.learned, fit=fit)) for case in mine]
        rows = [
            (abs(one.drop - max(case.drop, 0.0)), one.low - 1e-9 <= max(case.drop, 0.0) <= one.high, one.high - one.low)
            for case, one in told
        ]
        whole += rows
        lines.append(_line(name, rows, max(case.drop for case in mine)))
    lines.append(_line("all", whole, max(case.drop for case in cases)))
    return "\n".join(lines)


def _line(name: str, rows: list[tuple[float, bool, float]], largest: float) -> str:
    errors, held, widths = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return (
        f"| {name} | {len(rows)} | {errors.mean():.2f} | {np.median(errors):.2f} | {100 * held.mean():.0f} % |"
        f" {widths.mean():.1f} | {largest:.1f} |"
    )


if __name__ == "__main__":
    main()
