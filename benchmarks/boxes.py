"""YOLOX's boxes: how many of the float network's a quantized one still finds.

    python benchmarks/boxes.py DATA [--bits W8A8] [--plan deploy] [--set field=value ...] [--photographs]

Photographs are letterboxed as the network expects them (BGR, 0..255). Boxes are decoded as the network's authors do, those of a
score (objectness x class) above 0.25 kept, overlapping ones of a class removed at IoU 0.45. The float network's boxes are the
truth: mAP@0.5 of the quantized network's boxes over the classes that it finds, and F1. The quantized network is calibrated on
`fractal` images or, with --photographs, on the first twelve of the folder's; photographs 17, 19, ... 39 are scored. One JSON row
on standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import dreamquant
from dreamquant.samples import Samples

Array = NDArray[Any]
SIDE, STRIDES = 416, (8, 16, 32)
CONFIDENCE, OVERLAP, FOUND = 0.25, 0.45, 0.5
LEAST = 0.01  # score of a box that counts for the mean average precision


class Box(NamedTuple):
    """A box of a class, its score, and its corners left, top, right, bottom in pixels."""

    kind: int
    score: float
    corners: Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", default="W8A8")
    parser.add_argument("--plan", default="deploy")
    parser.add_argument("--set", nargs="+", default=[], dest="changes")
    parser.add_argument("--photographs", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = dreamquant.load(given.data / "coco/yolox_nano.onnx", mean=(0.0,) * 3, std=(1 / 255,) * 3)
    photographs = sorted((given.data / "coco/images").glob("*.jpg"))
    if given.photographs:
        samples = Samples(torch.stack([letterboxed(path) for path in photographs[:12]]))
    else:
        samples = dreamquant.synthesize(network, 16, method="fractal", seed=0)
    changes = dict(change.split("=", 1) for change in given.changes)
    student = dreamquant.quantize(network, samples, bits=given.bits, plan=given.plan, **changes)
    scored = torch.stack([letterboxed(path) for path in photographs[16:39:2]])
    expected, actual = (torch.cat([one(image) for image in scored.split(1)]) for one in (network, student))
    off = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    row = {"bits": given.bits, "plan": given.plan, **changes, "photographs": given.photographs, "images": len(scored)}
    row |= {"relative_error": off.mean().item(), "worst": off.max().item(), **compared(expected, actual)}
    print(json.dumps(row))


def letterboxed(path: Path) -> Tensor:
    """A photograph as the network expects it: (3, 416, 416), BGR, 0..255, grey where it does not reach."""
    pixels = np.asarray(letterbox(Image.open(path)), np.float32)[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def letterbox(image: Image.Image) -> Image.Image:
    """A photograph, RGB, in the upper left corner of a grey canvas that its longer side fills."""
    scale = min(SIDE / image.width, SIDE / image.height)
    small = image.convert("RGB").resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (SIDE, SIDE), (114, 114, 114))
    canvas.paste(small)
    return canvas


def compared(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """mAP@0.5 and F1 of a network's outputs (N, cells, 5 + classes) where another's are the truth."""
    truth = [boxes(output, CONFIDENCE) for output in expected.numpy()]
    found = [boxes(output, LEAST) for output in actual.numpy()]
    kinds = sorted({box.kind for image in truth for box in image})
    precisions = [_average_precision(*_hits(truth, found, kind)) for kind in kinds]
    sure = [[box for box in image if box.score > CONFIDENCE] for image in found]
    right = sum(int(_hits(truth, sure, kind)[0].sum()) for kind in kinds)
    count = sum(map(len, truth)) + sum(map(len, sure))
    return {"boxes": sum(map(len, truth)), "mAP": float(np.mean(precisions)), "F1": 2 * right / max(count, 1)}


def boxes(output: Array, least: float) -> list[Box]:
    """The boxes of one image's output (cells, 5 + classes), best first."""
    centre, size = _decoded(output)
    scores = output[:, 4:5] * output[:, 5:]
    kept: list[Box] = []
    cells, kinds = np.nonzero(scores > least)
    for index in np.argsort(-scores[cells, kinds], kind="stable"):
        cell, kind = cells[index], int(kinds[index])
        corners = np.concatenate([centre[cell] - size[cell] / 2, centre[cell] + size[cell] / 2])
        if all(overlap(corners, box.corners) <= OVERLAP for box in kept if box.kind == kind):
            kept.append(Box(kind, float(scores[cell, kind]), corners))
    return kept


def _decoded(output: Array) -> tuple[Array, Array]:
    """Centres and sizes (cells, 2) in pixels."""
    places, steps = [], []
    for stride in STRIDES:
        count = SIDE // stride
        y, x = np.meshgrid(np.arange(count), np.arange(count), indexing="ij")
        places.append(np.stack([x.ravel(), y.ravel()], 1))
        steps.append(np.full((count * count, 1), stride))
    place, step = np.concatenate(places), np.concatenate(steps)
    return (output[:, :2] + place) * step, np.exp(output[:, 2:4]) * step


def overlap(one: Array, other: Array) -> float:
    """The intersection over the union of two boxes."""
    inside = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    return float(inside / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - inside + 1e-9))


def _hits(truth: list[list[Box]], found: list[list[Box]], kind: int) -> tuple[Array, int]:
    """Whether each found box of a class, best first, is one that is there and not found yet, and how many are there."""
    rest = [[box.corners for box in image if box.kind == kind] for image in truth]
    there = sum(map(len, rest))
    ranked = sorted(_numbered(found, kind), key=lambda pair: -pair[1].score)
    hits = np.zeros(len(ranked))
    for rank, (image, box) in enumerate(ranked):
        overlaps = [overlap(box.corners, corners) for corners in rest[image]]
        if overlaps and max(overlaps) >= FOUND:
            hits[rank] = 1
            rest[image].pop(int(np.argmax(overlaps)))
    return hits, there


def _numbered(found: list[list[Box]], kind: int) -> Iterable[tuple[int, Box]]:
    return ((image, box) for image, kept in enumerate(found) for box in kept if box.kind == kind)


def _average_precision(hits: Array, there: int) -> float:
    """The area under precision over recall, each precision the best at its recall or a higher one."""
    if not len(hits):
        return 0.0
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best * hits).sum() / there)


if __name__ == "__main__":
    main()
