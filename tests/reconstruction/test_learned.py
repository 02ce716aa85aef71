"""The learnt parts: what they compute, and their gradients, against plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.reconstruction._learned import LearnedStep, SoftRounding, draw, mixed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(5, 3, 3, 3, generator=generator())


@pytest.fixture
def grid(weight: Tensor) -> Grid:
    low, high = weight.flatten(1).aminmax(dim=1)
    return grid_of_range(low, high, bits=3, symmetric=False, axis=0)


def test_rounding_starts_at_the_weight_itself(weight: Tensor, grid: Grid) -> None:
    module = SoftRounding(weight, grid, learn_scale=False)
    step = grid.scale.view(-1, 1, 1, 1)
    # zero points are whole numbers: the very ends of a range may lie up to half a step outside
    assert ((module(weight) - weight).abs() <= 0.5001 * step).all()
    assert ((module(weight) - weight).abs() < 1e-5).float().mean() > 0.9


def test_rounded_weights_are_one_of_the_two_levels_around_them(weight: Tensor, grid: Grid) -> None:
    module = SoftRounding(weight, grid, learn_scale=False)
    with torch.no_grad():
        module.logits.copy_(torch.randn(weight.shape, generator=generator(1)))
    rounded, same = module.rounded()
    scale, zero_point = grid.shaped(4)
    levels = rounded / scale + zero_point
    assert (levels - levels.round()).abs().max() < 1e-4
    assert set((levels.round() - module.base).clamp(0, 1).unique().tolist()) == {0.0, 1.0}
    assert levels.min() > grid.qmin - 0.1
    assert levels.max() < grid.qmax + 0.1
    torch.testing.assert_close(same.fake(rounded), rounded)


def test_the_regulariser_is_nothing_once_all_is_rounded(weight: Tensor, grid: Grid) -> None:
    module = SoftRounding(weight, grid, learn_scale=False)
    assert module.regulariser(2.0) > 10
    with torch.no_grad():
        module.logits.copy_(torch.where(module.logits >= 0, 9.0, -9.0))
    assert module.regulariser(2.0) == 0


def test_the_base_stays_while_scale_and_rounding_move(weight: Tensor, grid: Grid) -> None:
    module = SoftRounding(weight, grid, learn_scale=True)
    base = module.base.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (module(weight) - 1.3 * weight).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.base, base)
    assert (module.scale / grid.scale.view(-1, 1, 1, 1)).mean() > 1.1
    assert not module.base.requires_grad
    torch.testing.assert_close(module.rounded()[1].scale, module.scale.detach().flatten())


@pytest.mark.parametrize("zero_point", [0.0, 3.0])
def test_a_learnt_steps_gradients_are_lsqs(zero_point: float) -> None:
    grid = Grid(torch.tensor([0.3]), torch.tensor([zero_point]), 0, 7)
    module = LearnedStep(grid, learn=True, drop=0.0, generator=generator())
    x = (2 * torch.randn(400, generator=generator(1))).requires_grad_()
    pull = torch.randn(400, generator=generator(2))
    (module(x) * pull).sum().backward()

    scale = torch.tensor(0.3, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    ratio = other / scale
    whole = ratio + (ratio.round() - ratio).detach()
    result = whole.clamp(-zero_point, 7 - zero_point) * scale
    (result * pull).sum().backward()
    torch.testing.assert_close(module(x), result)
    torch.testing.assert_close(module.scale.grad, scale.grad)
    near = ((ratio.round() + zero_point) == 0) | ((ratio.round() + zero_point) == 7)  # the ends, where definitions may part
    torch.testing.assert_close(x.grad[~near], other.grad[~near])
    torch.testing.assert_close(module.learnt().scale, grid.scale)


def test_dropped_elements_are_float_and_pass_their_gradient() -> None:
    grid = Grid(torch.tensor([1.0]), torch.tensor([0.0]), 0, 3)
    module = LearnedStep(grid, learn=True, drop=0.5, generator=generator())
    x = torch.linspace(-5, 9, 4000).requires_grad_()
    y = module(x)
    y.sum().backward()
    kept = y == x
    outside = (x < -0.5) | (x > 3.5)
    assert 0.45 < kept[outside].float().mean() < 0.55
    torch.testing.assert_close(y[~kept], x[~kept].round().clamp(0, 3))
    assert torch.equal(x.grad, torch.where(outside & ~kept, 0.0, 1.0))


def test_draws_have_their_share_and_come_from_the_generator() -> None:
    one, two, other = (
        draw(torch.empty(7, 1001), 0.3, generator(3)),
        draw(torch.empty(7, 1001), 0.3, generator(3)),
        draw(torch.empty(7, 1001), 0.3, generator(4)),
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert abs(one.mean().item() - 0.3) < 0.02
    a, b = torch.zeros(9, 9), torch.ones(9, 9)
    assert set(mixed(a, b, 0.5, generator()).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mixed(a, b, 0.0, generator()), a)
