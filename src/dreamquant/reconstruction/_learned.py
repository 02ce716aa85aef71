"""What is learnt of a unit: which way each weight is rounded, and the steps of its weights and activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dreamquant.devices import CPU
from dreamquant.quantization.grid import Grid

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid of AdaRound (eq. 23), clipped to [0, 1]


class SoftRounding(nn.Module):
    """A weight on grid s (B + h(V) - z), B whole numbers that never change, h(V) in [0, 1] learnt: AdaRound (eqs. 22, 23).

    `learn_scale`: s is learnt with V, which B being constant allows (Genie, section 3.2).
    """

    def __init__(self, weight: Tensor, grid: Grid, *, learn_scale: bool) -> None:
        super().__init__()
        self.grid = grid
        scale, zero_point = grid.shaped(weight.dim())
        ratio = weight / scale
        self.base = ratio.floor() + zero_point
        share = ((ratio - ratio.floor()) - GAMMA) / (ZETA - GAMMA)
        self.logits = nn.Parameter(-torch.log(1 / share - 1))
        self.scale = nn.Parameter(scale.clone(), requires_grad=learn_scale)
        self.zero_point = zero_point

    def soft(self) -> Tensor:
        """h(V), which way each weight is rounded: from 0, down, to 1, up."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        return self._at(self.soft())

    def regulariser(self, beta: float) -> Tensor:
        """sum 1 - |2 h - 1|^beta: 0 once each weight is rounded one way or the other (AdaRound, eq. 24)."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def rounded(self) -> tuple[Tensor, Grid]:
        """The weight with every h at 0 or 1, and the grid that it stands on."""
        with torch.no_grad():
            weight = self._at((self.logits >= 0).float())
            return weight, replace(self.grid, scale=self.scale.detach().reshape(self.grid.scale.shape).clone())

    def _at(self, share: Tensor) -> Tensor:
        return ((self.base + share).clamp(self.grid.qmin, self.grid.qmax) - self.zero_point) * self.scale


class LearnedStep(nn.Module):
    """An activation on a grid whose step is learnt (LSQ), left as it is, element by element, with probability `drop` (QDrop)."""

    def __init__(self, grid: Grid, *, learn: bool, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.grid, self.drop, self.generator = grid, drop, generator
        self.scale = nn.Parameter(grid.scale.reshape(()).clone(), requires_grad=learn)
        self.zero_point = float(grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        active = draw(x, 1 - self.drop, self.generator) if self.drop else None
        ends = (self.grid.qmin - self.zero_point, self.grid.qmax - self.zero_point)
        result: Tensor = _Quantized.apply(x, self.scale, ends, active)  # type: ignore[no-untyped-call]
        return result

    def learnt(self) -> Grid:
        """The grid with its step as it is now."""
        return replace(self.grid, scale=self.scale.detach().reshape(self.grid.scale.shape).clone())


class _Quantized(torch.autograd.Function):
    """s clamp(round(x / s), ends) where `active` is 1, x where it is 0.

    Gradients as LSQ (Esser et al., ICLR 2020, eqs. 3, 5): for x straight through inside the range, for s round(x / s) - x / s
    inside and the end of the range outside. One function of few passes over memory: these tensors are what a step's time goes to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, ends: tuple[float, float], active: Tensor | None) -> Tensor:
        ratio = x / scale
        levels = torch.round(ratio).clamp_(*ends)
        error = levels - ratio
        inside = torch.empty_like(error)
        torch.le(error.abs(), 0.5, out=inside)
        if ctx.needs_input_grad[1]:
            slope = levels.addcmul_(ratio, inside, value=-1)
            ctx.slope = slope if active is None else slope.mul_(active)
        error.mul_(scale.detach())
        if active is not None:
            error.mul_(active)
            inside.add_(1 - active).clamp_(max=1)
        ctx.inside = inside
        return error.add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        step = torch.dot(gradient.flatten(), ctx.slope.flatten()) if ctx.needs_input_grad[1] else None
        return gradient * ctx.inside if ctx.needs_input_grad[0] else None, step, None, None


def draw(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Ones with probability `share`, to 1/256, else zeros, in a tensor's shape; eight of them from one random number."""
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=CPU).random_(-(2**63), None, generator=generator)
    found = torch.empty(count, device=like.device)
    torch.lt(words.to(like.device).view(torch.uint8)[:count], round(256 * share), out=found)
    return found.view(like.shape)


def mixed(one: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each element of `other` with probability `share`, else that of `one`."""
    return torch.addcmul(one, other - one, draw(one, share, generator))
