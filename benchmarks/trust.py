"""Fit the estimate of lost accuracy to all that was measured with labels, and test it on networks left out of the fit.

    python -m benchmarks.trust            # the test as Markdown
    python -m benchmarks.trust --ship     # and write src/dreamquant/assess/trust.json

Takes every row of `benchmarks/results` that holds the answers on probes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import RESULTS, commit
from dreamquant.assess.probes import Probe
from dreamquant.assess.trust import Fit, beyond, features, to_scale, trust
from dreamquant.files import atomic_write

SHIPPED = Path(__file__).parent.parent / "src" / "dreamquant" / "assess" / "trust.json"
LEVEL = 90.0
ROUNDING = 1e-9  # of a sum of weights
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
    """Least squares on the scale of `to_scale`, and the interval of the test below, every network with the same say."""
    below, above = weighted_quantiles(residuals(cases), says(cases), [(100 - LEVEL) / 200, (100 + LEVEL) / 200])
    probes = {kind: [case.probes[place] for case in cases] for place, kind in enumerate(KINDS)}
    sure = [probe.confidence for probe in probes[KINDS[0]]]
    return Fit(
        weights=weights_of(cases),
        below=below,
        above=above,
        level=LEVEL,
        cases=len(cases),
        networks=len({case.network for case in cases}),
        ranges={kind: (min(one.kl for one in seen), max(one.kl for one in seen)) for kind, seen in probes.items()},
        confidence=(min(sure), max(sure)),
        images={kind: min(one.samples for one in seen) for kind, seen in probes.items()},
    )


def says(cases: list[Measured]) -> list[float]:
    """The weight of each case: a network's cases share one."""
    count = Counter(case.network for case in cases)
    return [1.0 / count[case.network] for case in cases]


def weighted_quantiles(values: list[float], weights: list[float], levels: list[float]) -> list[float]:
    """The least of the values up to which so much of the weight lies, for each level (0 to 1)."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order]) / sum(weights)
    return [float(np.array(values)[order][np.searchsorted(reached, level - ROUNDING)]) for level in levels]


def weights_of(cases: list[Measured]) -> list[float]:
    say = np.sqrt(says(cases))
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
    """Leave one network out: fit, interval and limits are of the others only; errors are those of the losses that are told."""
    lines = [
        "| network left out | cases | told | mean error | median error | in the interval | mean width | largest loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    networks: list[list[Row]] = []
    for name in dict.fromkeys(case.network for case in cases):
        fit = fitted([case for case in cases if case.network != name])
        mine = [case for case in cases if case.network == name]
        networks.append([_row(case, fit) for case in mine if not beyond(case.probes, fit)])
        lines.append(_line(name, len(mine), networks[-1], max(case.drop for case in mine)))
    lines.append(_line("all", len(cases), [row for rows in networks for row in rows], max(case.drop for case in cases)))
    held = np.mean([np.mean([row[1] for row in rows]) for rows in networks if rows])
    lines.append(f"| all, every network the same say | | | | | {100 * held:.0f} % | | |")
    return "\n".join(lines)


Row = tuple[float, bool, float]  # of one case: the error, whether the interval held, and how wide it is


def _row(case: Measured, fit: Fit) -> Row:
    one, drop = trust(case.probes, learned=case.learned, fit=fit), max(case.drop, 0.0)
    return abs(one.drop - drop), one.low - 1e-9 <= drop <= one.high, one.high - one.low


def _line(name: str, cases: int, rows: list[Row], largest: float) -> str:
    if not rows:
        return f"| {name} | {cases} | 0 | - | - | - | - | {largest:.1f} |"
    errors, held, widths = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return (
        f"| {name} | {cases} | {len(rows)} | {errors.mean():.2f} | {np.median(errors):.2f} | {100 * held.mean():.0f} % |"
        f" {widths.mean():.1f} | {largest:.1f} |"
    )


if __name__ == "__main__":
    main()
