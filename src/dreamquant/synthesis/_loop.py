"""The loop that all dreaming methods share, and the pieces of their objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dreamquant.errors import DreamQuantError, OptionError
from dreamquant.network.graph import Network
from dreamquant.network.statistics import BatchNormStatistics, moments

Callback = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


def optimize(
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    patience: int,
    tolerance: float = 0.0,
    smallest_rate: float = 1e-4,
    callback: Callback | None = None,
) -> list[float]:
    """Adam on `loss` with the learning rate divided by ten whenever `patience` steps brought no new best (ZeroQ's schedule).

    Returns the loss of each step. With `tolerance` > 0 it stops early, once `2 * patience` steps have improved the best loss by
    less than that fraction. Raises `OptionError` for impossible numbers, `DreamQuantError` when the loss is no longer finite.
    """
    if steps < 1:
        raise OptionError(f"steps is {steps}; at least one step is needed")
    if not 0 < learning_rate < math.inf:
        raise OptionError(f"learning_rate is {learning_rate}; it must be above 0 and finite")
    optimizer = torch.optim.Adam(list(parameters), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=smallest_rate)
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
        if not torch.isfinite(value):
            raise DreamQuantError(f"the synthesis loss became {losses[-1]} at step {step + 1}; try a smaller learning_rate")
        schedule.step(losses[-1])
        if callback is not None:
            callback(step + 1, steps, losses[-1])
        if tolerance and _settled(losses, 2 * patience, tolerance):
            break
    return losses


def _settled(losses: list[float], window: int, tolerance: float) -> bool:
    if len(losses) <= window:
        return False
    before = min(losses[:-window])
    return before - min(losses[-window:]) < tolerance * abs(before)


def gaussian(network: Network, count: int, generator: torch.Generator) -> Tensor:
    """Images of independent Gaussian pixels with the mean and deviation of the network's input space, channels last."""
    mean, std = network.input_statistics
    images = torch.randn((count, *network.input_shape), generator=generator) * std + mean
    return images.contiguous(memory_format=torch.channels_last)


def precision() -> AbstractContextManager[object]:
    """bfloat16 where this processor computes in it, else float32 as it is."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def statistics_distance(features: list[Tensor], targets: list[BatchNormStatistics], *, per_sample: bool) -> Tensor:
    """Sum over BatchNorms of ||mean - mean_BN||^2 + ||std - std_BN||^2, summed over channels (ZeroQ, eq. 1).

    With `per_sample` the statistics of each image over its pixels are matched and their distances averaged over the batch;
    otherwise those of the whole batch.
    """
    total = torch.zeros(())
    for feature, target in zip(features, targets, strict=True):
        total = total + moment_distance(feature, target.mean, target.std, per_sample=per_sample)
    return total


def moment_distance(feature: Tensor, mean: Tensor, std: Tensor, *, per_sample: bool) -> Tensor:
    """||mean(feature) - mean||^2 + ||std(feature) - std||^2 over channels, averaged over the batch where per sample."""
    actual_mean, actual_std = moments(feature, per_sample=per_sample)
    distance = (actual_mean - mean).square().sum(-1) + (actual_std - std).square().sum(-1)
    return distance.mean()


def spread_labels(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """`count` class labels, as evenly spread over the classes as can be, in random order."""
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count]
