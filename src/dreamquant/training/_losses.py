"""What a student is to learn from its teacher. Scores are logits (N, classes), labels (N,)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError, unknown

REDUCTIONS = ("batchmean", "mean")


def distillation(scores: Tensor, teacher: Tensor, *, temperature: float, reduction: str = "batchmean") -> Tensor:
    """T^2 KL(teacher || student) of the softmax of scores / T (Hinton et al. 2015).

    "batchmean" averages over the batch. "mean" averages over classes as well, as `KLDivLoss` once did by default and GDFQ's
    released code does: a thousandth of it for a thousand classes.
    """
    expected, actual = ((one.float() / temperature).log_softmax(1) for one in (teacher, scores))
    parts = F.kl_div(actual, expected, reduction="none", log_target=True)
    return temperature**2 * (parts.mean() if reduction == "mean" else parts.sum(1).mean())


def decoupled(
    scores: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, alpha: float = 1.0, beta: float | Tensor
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), averaged over the batch (Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7).

    With p the softmax of scores / T and y the label: TCKD is the divergence of (p_y, 1 - p_y), NCKD that of p over the other
    classes alone, where they sum to 1. `beta` may be a tensor (N,); with beta = 1 - p_y of the teacher and alpha = 1 the sum is
    plain distillation. Finite for whatever finite scores: every probability stays a logarithm.
    """
    others = ~F.one_hot(labels, scores.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """log (p_y, 1 - p_y) (N, 2); log p of the other classes among themselves (N, classes - 1)."""
        logits = logits.float() / temperature
        rest = logits[others].view(len(logits), -1)
        sums = torch.stack([logits.gather(1, labels.unsqueeze(1)).squeeze(1), rest.logsumexp(1)], 1)
        return sums.log_softmax(1), rest.log_softmax(1)

    target, other = (
        F.kl_div(actual, expected, reduction="none", log_target=True).sum(1)
        for actual, expected in zip(parts(scores), parts(teacher), strict=True)
    )
    return temperature**2 * (alpha * target + beta * other).mean()


@dataclass(frozen=True)
class Plain:
    """Cross entropy + weight * plain distillation: GDFQ's student loss (eq. 7)."""

    weight: float
    temperature: float
    reduction: str = "batchmean"

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.reduction not in REDUCTIONS:
            raise OptionError(unknown("reduction", self.reduction, REDUCTIONS))

    def __call__(self, scores: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        kept = distillation(scores, teacher, temperature=self.temperature, reduction=self.reduction)
        return F.cross_entropy(scores, labels) + self.weight * kept


@dataclass(frozen=True)
class Decoupled:
    """Cross entropy + decoupled distillation: LRQ's student loss."""

    alpha: float
    beta: float
    temperature: float

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, scores: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        kept = decoupled(scores, teacher, labels, temperature=self.temperature, alpha=self.alpha, beta=self.beta)
        return F.cross_entropy(scores, labels) + kept


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise OptionError(f"temperature is {temperature}; it must be above 0")
