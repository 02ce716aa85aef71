"""Boxes of a detector's answers, and how far two answers find the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamquant.mapped import in_parts
from dreamquant.network.outputs import BOX, Output

LEAST = 0.3  # of a box's confidence, where there are as many boxes as images; else the surest, one an image
MOST = 300  # boxes of an image that are looked at, the surest
OVERLAP = 0.5  # of areas: from there on two boxes of one class are the same


def coordinates(output: Output) -> list[int]:
    """The columns of an output of regions that are no scores."""
    every = range(output.shape[output.places - 1])
    return [column for column in every if column not in output.scores]


def confidence(output: Output, value: Tensor) -> Tensor:
    """(N, places): the largest score of each place, weighed by the first one where that is an objectness."""
    return _class_scores(output, value).amax(-1)


def _class_scores(output: Output, value: Tensor) -> Tensor:
    found = value.movedim(output.places, -1)[..., list(output.scores)]
    return found[..., 1:] * found[..., :1] if output.objectness else found


def box_agreement(output: Output, expected: Tensor, actual: Tensor) -> float:
    """F1, 0 to 1, of the boxes in `actual` answers (N, ...) against those in `expected` ones; 1 where neither has any."""
    sure = torch.cat([confidence(output, part).flatten() for (part,) in in_parts(expected)])
    least = min(LEAST, sure.topk(min(len(expected), len(sure))).values[-1].item())
    corners = are_corners(output, expected)
    same = found = 0
    for one, other in zip(expected, actual, strict=True):
        ones, others = (find_boxes(output, value, least, corners)[:2] for value in (one, other))
        same += _matched(*ones, *others)
        found += len(ones[0]) + len(others[0])
    return 2 * same / found if found else 1.0


def are_corners(output: Output, value: Tensor) -> bool:
    """Whether boxes are two corners, rather than a centre and two sides: the second pair is then always beyond the first."""
    box = value.movedim(output.places, -1)[..., coordinates(output)[:BOX]]
    return bool((box[..., 2:] >= box[..., :2]).all())


def find_boxes(output: Output, value: Tensor, least: float, corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Corners (boxes, 4), classes (boxes,) and confidences (boxes,) of one image's answer, the surest first.

    Boxes below the `least` confidence are left out, and those of a class that overlap a surer one. `corners` is `are_corners`.
    """
    scores, classes = _class_scores(output, value.unsqueeze(0))[0].max(-1)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= least][:MOST]
    box = value.unsqueeze(0).movedim(output.places, -1)[0][order][:, coordinates(output)[:BOX]]
    if not corners:
        box = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)
    classes = classes[order]
    alike = (overlaps(box, box) >= OVERLAP) & (classes[:, None] == classes)
    kept: list[int] = []
    for place in range(len(box)):
        if not bool(alike[place, kept].any()):
            kept.append(place)
    return box[kept], classes[kept], scores[order][kept]


def _matched(box: Tensor, classes: Tensor, other: Tensor, others: Tensor) -> int:
    """How many boxes find one of their class in `other`, the surest first, each of these once."""
    fit = overlaps(box, other) * (classes[:, None] == others)
    found = 0
    for row in fit:
        if len(row) and bool(row.max() >= OVERLAP):
            fit[:, row.argmax()] = 0
            found += 1
    return found


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union (len(one), len(other)) of boxes by their corners (n, 4)."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(-1) for box in (one, other)]
    return inside / (areas[0][:, None] + areas[1] - inside).clamp(min=1e-9)
