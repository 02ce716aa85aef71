"""Freeing a graph of the batch size it was written down with, and the proof that it is free.

The sizes in a traced graph are those of one batch. They are tied to the number of images, and what comes out is
believed only after it has run on batches of three and one and returned what the original graph returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from dreamquant.errors import DreamQuantError
from dreamquant.network.batch_sizes import BatchFreer, NotFreeError
from dreamquant.network.canonical import infer_sizes
from dreamquant.network.edit import copied
from dreamquant.network.graph import run_once

TRIED = (3, 1)
LOUDNESS = torch.tensor([0.5, 2.0, 1.0]).view(-1, 1, 1, 1)  # of the images: the loudest fills up no piece
TOLERANCE = 1e-3  # of 1 + the largest output; kernels differ a little between batch sizes


def noise(batch: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal images (batch, *shape), the same at every call."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def difference(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference over 1 + the largest finite expected value; infinite where shapes or NaNs differ."""
    if expected.shape != actual.shape:
        return math.inf
    one, other = expected.double(), actual.double()
    same = (one == other) | (one.isnan() & other.isnan())
    if bool(same.all()):
        return 0.0
    gap = (one - other).abs()[~same].max().item()
    scale = 1 + one[one.isfinite()].abs().max().item() if bool(one.isfinite().any()) else 1.0
    return math.inf if math.isnan(gap) else gap / scale


def free_batch(graph: fx.GraphModule, input_shape: tuple[int, int, int], batch: int) -> int | None:
    """Rewrite `graph`, which runs batches of `batch` images (C, H, W), to run any; None where that is proven.

    Otherwise the graph stays as it was and `batch` is returned. Every tensor-valued node needs its shape as
    recorded on `batch` images. Nodes of a graph that had to be rewritten are new objects under their old names.
    """
    images = noise(max(TRIED), input_shape) * LOUDNESS
    expected = _reference(graph, images, batch)
    for trial in _candidates(graph, batch):
        if _is_free(trial, images, expected, batch):
            if trial is not graph:
                graph.graph = trial.graph
            infer_sizes(graph)
            return None
    return batch


def _candidates(graph: fx.GraphModule, batch: int) -> Iterator[fx.GraphModule]:
    """Graphs that may run any batch, the likeliest first, none twice."""
    seen = set()
    for repeats in (True, False):  # a constant repeated `batch` times usually stands for the batch, but need not
        trial = copied(graph)
        try:
            BatchFreer(trial, batch, repeats=repeats).rewrite()
        except NotFreeError:
            continue
        changed = str(trial.graph) != str(graph.graph)
        if str(trial.graph) not in seen:
            seen.add(str(trial.graph))
            yield trial if changed else graph
    if str(graph.graph) not in seen:
        yield graph


def images_axis(one: Sequence[int], count: int, other: Sequence[int], number: int) -> int | None:
    """The axis of the images in a tensor that has the shape `one` for `count` images and `other` for another number of them;
    None where no size follows their number."""
    if len(one) != len(other):
        return None
    pairs = enumerate(zip(one, other, strict=True))
    return next((axis for axis, (size, at) in pairs if size != at and size * number == at * count), None)


def _reference(graph: fx.GraphModule, images: Tensor, batch: int) -> list[list[Tensor]]:
    """Each output on any number of images, in pieces of `batch` of them; the last is filled up with copies."""
    missing = -len(images) % batch
    filled = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
    runs = [run_once(graph, piece) for piece in torch.split(filled, batch)]
    return [list(pieces) for pieces in zip(*runs, strict=True)]


def _wanted(pieces: list[Tensor], batch: int, like: Tensor, count: int) -> Tensor:
    """What an output in pieces of `batch` images is for the first `count` of them, along the axis that `like`, for as many,
    differs in; where it does not, the output has nothing to do with their number."""
    axis = images_axis(like.shape, count, pieces[0].shape, batch)
    if axis is None:
        return pieces[0]
    return torch.cat(pieces, axis).narrow(axis, 0, pieces[0].shape[axis] * count // batch)


def _is_free(graph: fx.GraphModule, images: Tensor, expected: list[list[Tensor]], batch: int) -> bool:
    for count in TRIED:
        if count == batch:  # the graph ran that size to begin with
            continue
        try:
            outputs = run_once(graph, images[:count])
        except (DreamQuantError, RuntimeError, ValueError, IndexError):
            return False
        pairs = zip(expected, outputs, strict=True)
        if not all(difference(_wanted(pieces, batch, one, count), one) <= TOLERANCE for pieces, one in pairs):
            return False
    return True
