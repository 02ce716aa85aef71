"""The loop that all dreaming methods share, and the pieces of their objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.devices import CPU
from dreamquant.errors import DreamQuantError, OptionError, unknown
from dreamquant.network.graph import Network
from dreamquant.network.opaque import check_gradient, float_operators
from dreamquant.network.operators import CONVOLUTIONS, is_call
from dreamquant.network.outputs import class_output
from dreamquant.network.pairs import groups_of
from dreamquant.network.scores import scores_classes
from dreamquant.network.statistics import BatchNormStatistics, moments

Callback = Callable[[int, int, float], None]  # (steps done, steps in all, loss)


class Schedule(Protocol):
    """What changes a learning rate, told the loss after each step."""

    def step(self, metrics: Any) -> None: ...


@dataclass(frozen=True)
class Group:
    """Tensors that one Adam optimises, and how its learning rate changes."""

    parameters: Iterable[Tensor]
    learning_rate: float
    schedule: Callable[[torch.optim.Optimizer], Schedule]
    betas: tuple[float, float] = (0.9, 0.999)


def plateau(patience: int, smallest: float = 1e-4) -> Callable[[torch.optim.Optimizer], Schedule]:
    """The learning rate divided by ten whenever `patience` steps brought no new best (ZeroQ's schedule)."""
    if patience < 1:
        raise OptionError(f"patience is {patience}; at least one step is needed")
    return lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=smallest)


def cosine(steps: int, warm: int = 3) -> Callable[[torch.optim.Optimizer], Schedule]:
    """The learning rate up over the first steps, then down to nothing at the last."""
    return decay(lambda step: min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def decay(rate: Callable[[int], float]) -> Callable[[torch.optim.Optimizer], Schedule]:
    """The learning rate times `rate(step)`, whatever the loss does."""
    return lambda optimizer: _Decay(torch.optim.lr_scheduler.LambdaLR(optimizer, rate))


class _Decay:
    def __init__(self, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
        self.schedule = schedule

    def step(self, metrics: Any) -> None:  # noqa: ARG002 - the loss changes nothing here
        self.schedule.step()


def optimize(
    groups: Sequence[Group],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    tolerance: float = 0.0,
    window: int = 200,
    callback: Callback | None = None,
) -> list[float]:
    """Adam on `loss`. Returns the loss of each step.

    With `tolerance` > 0 it stops early, once `window` steps have improved the best loss by less than that fraction. Raises
    `OptionError` for impossible numbers, `DreamQuantError` when the loss is no longer finite.
    """
    if steps < 1:
        raise OptionError(f"steps is {steps}; at least one step is needed")
    for group in groups:
        if not 0 < group.learning_rate < math.inf:
            raise OptionError(f"learning_rate is {group.learning_rate}; it must be above 0 and finite")
    optimizers = [torch.optim.Adam(list(group.parameters), lr=group.learning_rate, betas=group.betas) for group in groups]
    schedules = [group.schedule(optimizer) for group, optimizer in zip(groups, optimizers, strict=True)]
    losses: list[float] = []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value = loss()
        check_gradient(value, "the synthesis loss", "procedural images need none: method fractal")
        value.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise DreamQuantError(f"the synthesis loss became {losses[-1]} at step {step + 1}; try a smaller learning_rate")
        for schedule in schedules:
            schedule.step(losses[-1])
        if callback is not None:
            callback(step + 1, steps, losses[-1])
        if tolerance and _settled(losses, window, tolerance):
            break
    return losses


def optimize_images(
    images: Tensor,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    patience: int,
    schedule: str = "plateau",
    tolerance: float = 0.0,
    callback: Callback | None = None,
) -> list[float]:
    """`optimize` for images themselves, with a schedule by name.

    `plateau` is the published one; `cosine` is ours for a tenth of the steps: the learning rate falls to nothing at the last
    step, and Adam forgets fast (betas 0.7, 0.9), which on these losses is worth more than any learning rate.
    """
    known = {
        "plateau": Group([images], learning_rate, plateau(patience)),
        "cosine": Group([images], learning_rate, cosine(steps), betas=(0.7, 0.9)),
    }
    if schedule not in known:
        raise OptionError(unknown("schedule", schedule, known))
    group = known[schedule]
    return optimize([group], loss, steps=steps, tolerance=tolerance, window=2 * patience, callback=callback)


def _settled(losses: list[float], window: int, tolerance: float) -> bool:
    if len(losses) <= window:
        return False
    before = min(losses[:-window])
    return before - min(losses[-window:]) < tolerance * abs(before)


def batches(count: int, size: int, callback: Callback | None) -> Iterator[tuple[slice, Callback | None]]:
    """Slices of `count` images in batches of nearly equal sizes, at most `size`, each with a callback that counts on."""
    if size < 1:
        raise OptionError(f"batch is {size}; at least one image is needed")
    number = -(-count // size)
    edges = [index * count // number for index in range(number + 1)]
    for index in range(number):
        yield slice(edges[index], edges[index + 1]), _counting_on(callback, index, number)


def _counting_on(callback: Callback | None, index: int, number: int) -> Callback | None:
    if callback is None:
        return None
    return lambda done, total, loss: callback(index * total + done, number * total, loss)


def gaussian(network: Network, count: int, generator: torch.Generator) -> Tensor:
    """Images of independent Gaussian pixels with the mean and deviation of the network's input space."""
    mean, std = network.input_statistics
    return arranged(torch.randn((count, *network.input_shape), generator=generator).to(mean.device) * std + mean)


def arranged(images: Tensor) -> Tensor:
    """The images in the memory layout that their device convolves fastest in."""
    return images.contiguous(memory_format=torch.channels_last if _has_bfloat16(images.device) else torch.contiguous_format)


def keep_to_pixels(network: Network, images: Tensor) -> None:
    """Cut off, in place, what no pixel can be, where it is known how pixels are fed."""
    ends = network.space.ends()
    if ends is not None:
        with torch.no_grad():
            images.clamp_(*(end.to(images.device) for end in ends))


def precision(network: Network) -> AbstractContextManager[object]:
    """bfloat16 on a processor that computes in it, else, as on GPUs, float32 as it is, and so where channels are convolved in
    groups: their gradients take twice as long in bfloat16."""
    grouped = any(is_call(node, CONVOLUTIONS) and groups_of(node) > 1 for node in network.graph.graph.nodes)
    return torch.autocast("cpu", dtype=torch.bfloat16) if _has_bfloat16(network.device) and not grouped else nullcontext()


def _has_bfloat16(device: torch.device) -> bool:
    return device == CPU and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def statistics_distance(features: list[Tensor], targets: list[BatchNormStatistics], *, per_sample: bool) -> Tensor:
    """Sum over BatchNorms of ||mean - mean_BN||^2 + ||std - std_BN||^2, summed over channels (ZeroQ, eq. 1).

    With `per_sample` the statistics of each image over its pixels are matched and their distances averaged over the batch;
    otherwise those of the whole batch.
    """
    total = torch.zeros((), device=CPU)  # a number, wherever the features lie
    for feature, target in zip(features, targets, strict=True):
        total = total + moment_distance(feature, target.mean, target.std, per_sample=per_sample)
    return total


def moment_distance(feature: Tensor, mean: Tensor, std: Tensor, *, per_sample: bool) -> Tensor:
    """||mean(feature) - mean||^2 + ||std(feature) - std||^2 over channels, averaged over the batch where per sample."""
    actual_mean, actual_std = moments(feature, per_sample=per_sample)
    distance = (actual_mean - mean).square().sum(-1) + (actual_std - std).square().sum(-1)
    return distance.mean()


def input_distance(network: Network, images: Tensor, *, per_sample: bool) -> Tensor:
    """`moment_distance` of the images themselves to the input space, in its units: mean 0, deviation 1."""
    mean, std = network.input_statistics
    zeros = images.new_zeros(mean.numel())
    return moment_distance((images - mean) / std, zeros, zeros + 1, per_sample=per_sample)


def variance_distance(features: list[Tensor], targets: list[BatchNormStatistics]) -> Tensor:
    """Mean over BatchNorms of the mean squared errors, over channels, of a batch's means and of its variances (GDFQ, IntraQ)."""
    total = torch.zeros((), device=CPU)  # a number, wherever the features lie
    for feature, target in zip(features, targets, strict=True):
        mean, std = moments(feature, per_sample=False)
        total = total + F.mse_loss(mean, target.mean) + F.mse_loss(std.square(), target.std.square())
    return total / max(len(targets), 1)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the norms of the batch's differences along both axes and both diagonals (DeepInversion, TV-l2)."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    # the norm's gradient at exactly zero is 0, as torch defines it
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def class_count(network: Network) -> int:
    """How many classes the network scores; `OptionError` where it scores none, or none that a gradient leads away from."""
    place = class_output(network.outputs)
    if place is None:
        given = "; ".join(map(str, network.outputs))
        raise OptionError(f"the network gives no class scores, and this method dreams of classes; its outputs: {given}")
    if not scores_classes(network):
        name, kept = network.outputs[place].name, ", ".join(float_operators(network)) or "whole numbers"
        raise OptionError(f"this method dreams of classes, and no gradient leads from {name} to the images, through {kept}")
    return network.outputs[place].classes


def spread_labels(network: Network, count: int, generator: torch.Generator) -> Tensor:
    """`count` labels of a network's classes, as evenly spread over these as can be, in random order."""
    classes = class_count(network)
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count].to(network.device)
