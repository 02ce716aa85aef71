"""What becomes of a network whose input space is stated rightly, wrongly or not at all: refused, or quantized, and how well.

    python -m benchmarks.input_spaces --data DATA [--only TEXT ...]
    python -m benchmarks.input_spaces --table

Every network of the data folder, with its BatchNorms and with these folded, is quantized to W8A8 by the default recipe under
each statement; the file is measured on images that are fed as they must be. A cell is wrong in silence where the file has lost
more than the file of the right statement and a tolerance, and nothing was refused or said to be unconfirmed. A case that has
its row in `benchmarks/results/input_spaces.jsonl` is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dreamquant
from benchmarks.models import MEAN, MODELS, STD, script, test_images
from benchmarks.run import RESULTS, commit
from dreamquant.assess.evaluate import evaluate
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.runtime import onnx_runner
from dreamquant.transform.fold_batchnorm import fold_batchnorm

PLACE = RESULTS / "input_spaces.jsonl"
IMAGES = 500  # to measure on
TOLERANCE = 2.0  # points: 0.3, and what chance does where two files of a network disagree on a tenth of so few images
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
DIGITS_MEAN, DIGITS_STD = (0.3054,), (0.3187,)


@dataclass(frozen=True)
class Subject:
    """A network by name, what is fed to it, and where its test images are those of."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tested_as: str

    def module(self, data: Path, folded: bool) -> nn.Module:
        """The network as a module, which stores nothing of its input space."""
        network = self.network(data)
        return (fold_batchnorm(network) if folded else network).graph

    def network(self, data: Path) -> Network:
        """The network as it is read from its file."""
        if self.name == "efficientnet_lite0":
            make = script(data / "more" / "nets.py")["efficientnet_lite0"]
            return load(make(), input_shape=(3, 224, 224), mean=self.mean, std=self.std)
        return load(data / MODELS[self.tested_as].file, mean=self.mean, std=self.std)


SUBJECTS = [
    Subject("digits", DIGITS_MEAN, DIGITS_STD, "digits"),
    Subject("resnet20", MEAN, STD, "resnet20"),
    Subject("mobilenetv1", MEAN, STD, "mobilenetv1"),
    Subject("mobilenetv2", MEAN, STD, "mobilenetv2"),
    Subject("squeezenet", MEAN, STD, "squeezenet"),
    Subject("efficientnet_lite0", LITE_MEAN, LITE_STD, "squeezenet"),
]


class Fed(nn.Module):
    """A network behind what is done to its images first."""

    def __init__(self, before: Callable[[Tensor], Tensor], net: nn.Module) -> None:
        super().__init__()
        self.before, self.net = before, net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(self.before(x))
        return result


class Normalise(nn.Module):
    """Pixels 0..255, made into what a network is trained on."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (x - self.mean) / self.std
        return result


def cases(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is stated, by the name of the case."""
    channels = len(subject.mean)
    right = {"mean": subject.mean, "std": subject.std}
    yield "right", right
    yield "nothing", {}
    yield "mean .5, std .5", {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    yield "numbers of 0..255", {"mean": tuple(255 * m for m in subject.mean), "std": tuple(255 * s for s in subject.std)}
    for pixels in ("0..1", "0..255", "-1..1"):
        yield f"pixels {pixels}", {"pixels": pixels}
    if channels == 3:
        yield "BGR", right | {"channels": "bgr"}
    yield "NHWC", right | {"layout": "NHWC"}
    yield "inside, nothing", {}


def measure(data: Path, subject: Subject, folded: bool, case: str, stated: dict[str, Any]) -> dict[str, Any]:
    """Quantize under a statement, and measure the file as it must be fed."""
    module, shape = subject.module(data, folded), subject.network(data).input_shape
    mean, std = subject.mean, subject.std
    if case == "NHWC":
        module = Fed(lambda x: x.permute(0, 3, 1, 2), module)
    if case.startswith("inside"):
        module, mean, std = nn.Sequential(Normalise(mean, std), module), (0.0,) * len(mean), (1 / 255,) * len(mean)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            result = dreamquant.run(module.eval(), path, input_shape=shape, estimate=False, **stated)
        except dreamquant.DreamQuantError as error:
            return {"refused": str(error)}
        images = test_images(data, subject.tested_as).spread(IMAGES)
        found = evaluate(onnx_runner(path, threads=1), images, input_shape=shape, mean=mean, std=std)
        space = result.network.space
        return {"top1": found.top1, "known": space.known, "said": space.sentence(), "agreement": result.assessment.agreement.top1}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for each statement, a column for each network."""
    names = [subject.name for subject in SUBJECTS]
    columns = sorted({(row["network"], row["folded"]) for row in rows}, key=lambda one: (names.index(one[0]), one[1]))
    cells = {(row["case"], row["network"], row["folded"]): row for row in rows}
    heads = [f"{name}{', folded' if folded else ''}" for name, folded in columns]
    lines = [f"| stated | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        shown = [_cell(cells.get((case, *column)), cells.get(("right", *column))) for column in columns]
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, right: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "refused" in row:
        return "refused"
    best = row["top1"] if right is None or "top1" not in right else right["top1"]
    lost = best - row["top1"]
    warned = "no BatchNorm confirms it" in row["said"]
    mark = "" if lost <= TOLERANCE else ", unconfirmed" if warned else ", **lost in silence**"
    return f"{row['top1']:.1f} ({row['known']}{mark})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the data folder")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases of which each of these texts is in the network, form or case"
    )
    parser.add_argument("--table", action="store_true", help="print the rows that there are as Markdown, and measure nothing")
    given = parser.parse_args()
    rows = [json.loads(line) for line in PLACE.read_text().splitlines()] if PLACE.exists() else []
    if given.table:
        print(table(rows))
        return
    if given.data is None:
        parser.error("--data is needed: the folder of models and images")
    torch.set_num_threads(1)
    done = {(row["network"], row["folded"], row["case"]) for row in rows}
    for subject in SUBJECTS:
        for folded in (False, True):
            if subject.name == "squeezenet" and folded:
                continue  # it has no BatchNorm to fold
            for case, stated in cases(subject):
                names = {"network": subject.name, "folded": folded, "case": case}
                text = f"{subject.name} {'folded' if folded else 'kept'} {case}"
                if tuple(names.values()) in done or not all(one in text for one in given.only):
                    continue
                row = names | measure(given.data, subject, folded, case, stated) | {"commit": commit()}
                print(text, {key: value for key, value in row.items() if key not in names}, flush=True)
                with PLACE.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
