"""How far apart two networks' answers are, by the kind of output, and in what a person counts that.

Answers are (N, ...), the images first (`Network.answers`). A `distance` is 0 where nothing differs and about as large for one
kind as for another: it is the Kullback-Leibler divergence of one answer from the other, in nats, of classes and labels; of
numbers half their squared error over their variance, which is that divergence of normal variables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.mapped import in_parts
from dreamquant.network.boxes import box_agreement, confidence, coordinates
from dreamquant.network.outputs import CLASSES, DENSE, FEATURES, MULTILABEL, REGIONS, SEQUENCE, VALUES, Output

LEAST = 1e-7  # of a probability: what a float32 softmax still tells from nothing
RIVALS = 3  # classes whose distance from the best one is followed
DEVIATIONS = 1.96  # of the normal distribution: 95 percent
SEEN = 0.3  # of a place's confidence: from there on it holds a box
LOOKS = 3  # random directions that other answers are followed in
UNITS = {  # what agreement is a percentage of
    CLASSES: "top-1",
    MULTILABEL: "labels",
    DENSE: "pixels' classes",
    FEATURES: "cosine",
    SEQUENCE: "time steps' classes",
    REGIONS: "boxes, F1",
    VALUES: "100 % less the relative error",
}


def logits(output: Output, scores: Tensor) -> Tensor:
    """Scores of classes or labels as logits, classes along `output.places`: their softmax, or of labels and of yes and no their
    sigmoid, are the probabilities."""
    if output.form == "probabilities":
        return scores.clamp(min=LEAST).log()
    return scores.clamp(LEAST, 1 - LEAST).logit() if output.form == "sigmoid" else scores


def class_logits(output: Output, scores: Tensor) -> Tensor:
    """Logits (N, K), K at least two, of an output of classes; one score for yes and no stands beside 0 for no."""
    found = logits(output, scores).flatten(1) if scores.dim() > 1 else logits(output, scores).unsqueeze(1)
    return found if found.shape[1] > 1 else torch.cat([torch.zeros_like(found), found], 1)


def divergence(expected: Tensor, actual: Tensor, axis: int = 1) -> float:
    """Mean Kullback-Leibler divergence of the softmax of `actual` logits from that of `expected` ones, in nats.

    Both are (N, classes, ...), or have classes along another axis. The sums are in double precision: eight bits cost less than
    single precision can tell from nothing.
    """
    one, other = (scores.double().log_softmax(axis) for scores in (expected, actual))
    parts = torch.where(one.isneginf(), 0.0, one.exp() * (one - other))
    return parts.sum(axis).mean().item()


def top1_agreement(expected: Tensor, actual: Tensor, axis: int = 1) -> float:
    """Percent of the images (and places) where both scores (N, classes, ...) have their largest in the same class."""
    return 100.0 * (expected.argmax(axis) == actual.argmax(axis)).double().mean().item()


# ---- distances, which training can follow


def spread(output: Output, expected: Tensor) -> float:
    """The variance that numbers' errors are measured by: what the answers to different images differ by, squared and averaged.

    Where they do not differ, or there is one image, the mean square stands in.
    """
    value = _numbers(output, expected)
    around = value - value.mean(0, keepdim=True) if len(value) > 1 else value
    variance = around.square().mean().item()
    return variance if variance > 0 else value.square().mean().clamp(min=1e-12).item()


def loss(output: Output, expected: Tensor, actual: Tensor, variance: float) -> Tensor:
    """The distance of `actual` answers from `expected` ones, averaged over images, as a tensor with a gradient."""
    if output.kind == FEATURES:
        return (1 - F.cosine_similarity(_rows(expected), _rows(actual))).mean()
    if output.kind == REGIONS:
        moved, sure, labels = _regions(output, expected, actual, variance)
        return moved / sure.clamp(min=1e-12) + labels
    if output.kind == VALUES:
        return (expected - actual).square().mean() / (2 * variance)
    one, other = logits(output, expected), logits(output, actual)
    if is_exclusive(output, expected):
        parts = F.kl_div(other.log_softmax(output.places), one.log_softmax(output.places), reduction="none", log_target=True)
        return parts.sum(output.places).mean()
    return _labels(one, other, output.places) if one.dim() > 1 else _labels(one, other, None)


def _regions(output: Output, expected: Tensor, actual: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far boxes are moved, weighed by confidences and summed; the sum of these; and the mean divergence of the scores."""
    one, other = (value.movedim(output.places, -1) for value in (expected, actual))
    columns, sure, scores = coordinates(output), confidence(output, expected), list(output.scores)
    errors = (one[..., columns] - other[..., columns]).square().mean(-1) / (2 * variance)
    return (errors * sure).sum(), sure.sum(), _labels(logits(output, one[..., scores]), logits(output, other[..., scores]), -1)


def _labels(expected: Tensor, actual: Tensor, axis: int | None) -> Tensor:
    """The divergence of labels by their logits, summed over those of a place."""
    parts = [
        torch.exp(F.logsigmoid(sign * expected)) * (F.logsigmoid(sign * expected) - F.logsigmoid(sign * actual))
        for sign in (1, -1)
    ]
    whole = parts[0] + parts[1]
    places = whole if axis is None else whole.sum(axis)
    mean: Tensor = places.mean()
    return mean


def distance(output: Output, expected: Tensor, actual: Tensor, variance: float) -> float:
    """The distance of `actual` answers from `expected` ones, averaged over images; numbers are measured by their `variance`."""
    if output.axis is None:
        return 0.0
    if output.form == "numbers":
        return (expected != actual).double().mean().item()
    if output.kind in (CLASSES, SEQUENCE, DENSE) and is_exclusive(output, expected):
        parts = ((len(one), logits(output, one), logits(output, other)) for one, other in in_parts(expected, actual))
        return sum(count * divergence(one, other, output.places) for count, one, other in parts) / len(expected)
    parts = ((len(one), one.double(), other.double()) for one, other in in_parts(expected, actual))
    if output.kind == REGIONS:
        found = [(count, _regions(output, one, other, variance)) for count, one, other in parts]
        moved, sure = (sum(one[place].item() for _, one in found) for place in (0, 1))
        return moved / max(sure, 1e-12) + sum(count * one[2].item() for count, one in found) / len(expected)
    return sum(count * loss(output, one, other, variance).item() for count, one, other in parts) / len(expected)


def is_exclusive(output: Output, value: Tensor) -> bool:
    """Whether one of several classes holds at a time, so that the largest score is the answer."""
    several = value.dim() > output.places and value.shape[output.places] > 1
    return output.kind in (CLASSES, SEQUENCE, DENSE) and output.form != "sigmoid" and several


# ---- what a person counts


def unit(output: Output) -> str:
    """What `agreement` is a percentage of."""
    return "equal numbers" if output.form == "numbers" else UNITS[output.kind]


def agreement(output: Output, expected: Tensor, actual: Tensor) -> float:
    """Percent of `unit`: how far `actual` answers are the `expected` ones."""
    if is_exclusive(output, expected):
        return top1_agreement(expected, actual, output.places)
    if output.kind == FEATURES:
        return 100.0 * F.cosine_similarity(_rows(expected.double()), _rows(actual.double())).mean().item()
    if output.kind == REGIONS:
        return 100.0 * box_agreement(output, expected, actual)
    if output.form == "numbers":
        return 100.0 * (expected == actual).double().mean().item()
    if output.kind == VALUES:
        return 100.0 * max(0.0, 1 - relative_error(expected, actual))
    border = 0.5 if output.form == "sigmoid" else 0.0
    return 100.0 * ((expected > border) == (actual > border)).double().mean().item()


def counts_images(output: Output) -> bool:
    """Whether agreement is a share of the images: what is counted within an image, or not at all, is none."""
    return output.kind == CLASSES and output.axis is not None


def shows(output: Output, expected: Tensor) -> bool:
    """Whether most of the answers to images hold what the output looks for: a box, a label, a place of another class.

    Where they hold nothing, all that is measured on such images is how nothing changes.
    """
    if output.kind == REGIONS:
        found = torch.cat([confidence(output, part).amax(1) >= SEEN for (part,) in in_parts(expected)])
    elif output.kind in (DENSE, SEQUENCE) and is_exclusive(output, expected):
        classes = expected.argmax(output.places).flatten(1)
        found = (classes != classes[:, :1]).any(1)
    elif output.kind in (MULTILABEL, DENSE):
        found = (logits(output, expected).flatten(1) > 0).any(1)
    else:
        return True
    return bool(found.double().mean() > 0.5)


def busy(output: Output, expected: Tensor) -> float:
    """The share of an answer's places that say something else than most of its image: of masks and of time steps those that are
    no ground. All of the others', which have none."""
    if output.kind not in (DENSE, SEQUENCE) or output.form == "numbers":
        return 1.0
    classes = expected.argmax(output.places) if is_exclusive(output, expected) else (logits(output, expected) > 0).long()
    flat = classes.flatten(1)
    return (flat != flat.mode(1, keepdim=True).values).double().mean().item()


def possible(share: float, count: int) -> tuple[float, float]:
    """The shares (of 1) that so many images leave possible where `share` of them agree: Wilson's interval, 95 percent."""
    z = DEVIATIONS
    middle = share + z * z / (2 * count)
    width = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    return max(0.0, (middle - width) / (1 + z * z / count)), min(1.0, (middle + width) / (1 + z * z / count))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """The root mean square of the errors over that of what the answers to different images differ by."""
    one, other = expected.double(), actual.double()
    around = one - one.mean(0, keepdim=True) if len(one) > 1 else one
    signal = around.square().mean().item() or one.square().mean().item()
    noise = (one - other).square().mean().item()
    return (noise / signal) ** 0.5 if signal else float(noise > 0)


# ---- what an error of the inner values is followed to


def margins(output: Output, value: Tensor, variance: float, seed: int) -> Tensor:
    """Numbers (N, D) of each answer whose squared changes say how far an error moves it.

    Of classes, the distances between the largest logit and the next; of all else, the answer in random directions of plus and
    minus ones (of `seed`), over the deviation of numbers and the root of how many there are: the mean square of its change is
    expected to be that of the whole answer's.
    """
    if output.kind == CLASSES:
        best = class_logits(output, value).topk(min(RIVALS + 1, class_logits(output, value).shape[1]), dim=1).values
        return best[:, :1] - best[:, 1:]
    if is_exclusive(output, value):
        best, second = logits(output, value).topk(2, dim=output.places).values.unbind(output.places)
        flat = (best - second).flatten(1)
    elif output.kind == FEATURES:
        flat = F.normalize(_rows(value), dim=1) * value[0].numel() ** 0.5
    elif output.kind == REGIONS:
        rows, columns = value.movedim(output.places, -1), coordinates(output)
        sure = confidence(output, value).detach()
        apart = rows[..., columns] / variance**0.5 * (sure / sure.mean(1, keepdim=True).clamp(min=1e-12)).sqrt().unsqueeze(-1)
        flat = torch.cat([apart.flatten(1), logits(output, rows[..., list(output.scores)]).flatten(1)], 1)
    else:
        flat = _rows(value) / variance**0.5 if output.kind == VALUES else _rows(logits(output, value))
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (flat.shape[1], LOOKS), generator=generator).to(flat) * 2 - 1
    looked: Tensor = flat @ signs / flat.shape[1] ** 0.5
    return looked


def _rows(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)


def _numbers(output: Output, value: Tensor) -> Tensor:
    """What of an answer is numbers: all of values, the coordinates of boxes."""
    if output.kind == REGIONS:
        return value.movedim(output.places, -1)[..., coordinates(output)].double()
    return value.double()


def spreads(outputs: Sequence[Output], expected: Sequence[Tensor]) -> list[float]:
    """`spread` of each output that is measured by one; 1 for the others."""
    pairs = zip(outputs, expected, strict=True)
    return [spread(output, value) if output.kind in (VALUES, REGIONS) else 1.0 for output, value in pairs]


def distances(
    outputs: Sequence[Output], expected: Sequence[Tensor], actual: Sequence[Tensor], variances: Sequence[float] | None = None
) -> float:
    """The distances of all outputs, summed; `variances`, by default those of `expected`, are what numbers are measured by."""
    found = spreads(outputs, expected) if variances is None else variances
    return sum(distance(*one) for one in zip(outputs, expected, actual, found, strict=True))
