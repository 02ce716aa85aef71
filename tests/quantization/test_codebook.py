"""A codebook moves each value to its nearest level; every method of the family gives levels that it can use."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.methods import Method, find_method, method_names
from dreamquant.network.graph import Network
from dreamquant.network.notes import shape_of
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples

METHODS = [find_method("codebooks", name) for name in method_names("codebooks")]


def values(*shape: int, seed: int = 0) -> Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


# --- the codebook -----------------------------------------------------------------------------------------------------


def brute_force(levels: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """Each value's nearest level, one value after the other."""
    found = torch.empty_like(x)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)):
        at = tuple(place.tolist())
        row = levels[0 if axis is None else at[axis]].to(x.dtype)
        found[at] = row[(row - x[at]).abs().argmin()]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_the_nearest_level_is_taken(axis: int | None, dtype: torch.dtype) -> None:
    x = values(5, 3, 4, 2, seed=1).to(dtype)
    levels = values(1 if axis is None else x.shape[axis], 8).sort(1).values
    codebook = Codebook(levels, axis)
    found, indices = codebook.fake(x), codebook.indices(x)

    assert found.dtype == dtype
    assert torch.equal(found, brute_force(levels, axis, x))
    assert indices.shape == x.shape
    chosen = levels[0][indices] if axis is None else levels.gather(1, codebook.rows(indices))
    assert torch.equal(chosen.to(dtype).flatten(), found.flatten() if axis is None else codebook.rows(found).flatten())
    assert codebook.bits == 3


def test_double_precision_is_not_rounded_away() -> None:
    """In single precision both values would be the border between the levels."""
    codebook = Codebook(torch.tensor([[0.0, 1.0]]))
    x = torch.tensor([0.5 - 1e-12, 0.5 + 1e-12], dtype=torch.float64)

    assert codebook.fake(x).tolist() == [0.0, 1.0]


def test_of_two_levels_as_near_the_lower_is_taken_and_repeated_ones_do_no_harm() -> None:
    codebook = Codebook(torch.tensor([[-1.0, 0.0, 1.0, 1.0]]))

    assert codebook.fake(torch.tensor([-0.5, 0.5, 0.9, 1.0, 7.0])).tolist() == [-1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_pass_straight_through(axis: int | None) -> None:
    x = values(3, 4, 5).requires_grad_()
    codebook = Codebook(values(1 if axis is None else x.shape[axis], 4, seed=2).sort(1).values, axis)
    factor = values(3, 4, 5, seed=3)
    y = codebook.fake(x)
    (y * factor).sum().backward()

    torch.testing.assert_close(y.detach(), codebook.fake(x.detach()))
    assert x.grad is not None
    assert torch.equal(x.grad, factor)


# --- the family's contract --------------------------------------------------------------------------------------------


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


ROWS = {
    "heavy tails": values(5, 300),
    "fewer values than levels": values(4, 3),
    "one value": torch.tensor([[0.25], [-3.0], [0.0]]),
    "constants": torch.tensor([0.0, 1.0, -2.5e-3, 1e-30]).view(-1, 1).repeat(1, 40),
    "positive": values(3, 200).abs() + 0.01,
    "far from 0": 100 + values(3, 200),
    "negative": -values(3, 200).abs(),
    "pruned": values(4, 500) * (values(4, 500, seed=1) > 1.5),
    "half of one value": values(3, 90).clamp(min=0.1),
    "two values": torch.where(values(3, 50) > 0, 1.0, -0.3),
    "an outlier": torch.cat([values(2, 400), torch.tensor([[1e4], [-1e4]])], 1),
    "even": torch.linspace(-1, 1, 257).repeat(2, 1),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ROWS)
def test_levels_are_as_many_as_asked_ascending_and_hold_zero(method: Method, name: str, bits: int) -> None:
    rows = ROWS[name]
    before = rows.clone()
    levels = method.function(rows, bits=bits)
    moved = Codebook(levels, 0).fake(rows)

    assert levels.shape == (len(rows), 2**bits)
    assert levels.dtype == torch.float32
    assert bool(levels.isfinite().all())
    assert bool((levels.diff(dim=1) >= 0).all())
    assert bool((levels == 0).any(1).all())
    assert torch.equal(rows, before)
    assert bool((moved[rows == 0] == 0).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5e-3, 1e-30])
def test_a_constant_row_is_kept(method: Method, value: float) -> None:
    rows = torch.full((2, 40), value)

    torch.testing.assert_close(Codebook(method.function(rows, bits=2), 0).fake(rows), rows, rtol=1e-6, atol=0)


def test_rows_do_not_know_of_each_other(method: Method) -> None:
    rows = values(5, 300) * torch.tensor([1.0, 100.0, 1e-3, 0.0, 7.0]).view(-1, 1)
    alone = torch.cat([method.function(row.unsqueeze(0), bits=4) for row in rows])

    assert torch.equal(method.function(rows, bits=4), alone)


def test_levels_grow_with_the_rows(method: Method) -> None:
    rows = values(3, 300)
    levels = method.function(rows, bits=4)

    assert torch.equal(method.function(4 * rows, bits=4), 4 * levels)


def test_the_same_rows_give_the_same_levels_and_no_randomness_is_used(method: Method) -> None:
    rows, state = values(3, 2000), torch.random.get_rng_state()

    assert torch.equal(method.function(rows, bits=4), method.function(rows, bits=4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_more_bits_bring_less_error(method: Method) -> None:
    rows = values(6, 700)
    errors = [(Codebook(method.function(rows, bits=bits), 0).fake(rows) - rows).square().mean(1) for bits in range(2, 9)]

    assert bool((torch.stack(errors).diff(dim=0) < 0).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_many_channels_take_little_time(method: Method, bits: int) -> None:
    rows = values(512, 4608)
    start = time.perf_counter()
    method.function(rows, bits=bits)

    assert time.perf_counter() - start < 15.0  # 1 to 2 s on one slow core


# --- students -----------------------------------------------------------------------------------------------------------


def distance(student: Student, network: Network, samples: Samples) -> float:
    return (student(samples.images) - network(samples.images)).square().mean().item()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("plan", ["deploy", "zeroq"])
def test_weights_of_a_student_are_on_their_levels(
    residual: Network, calibration: Samples, method: Method, plan: str, granularity: str
) -> None:
    student = quantize(residual, calibration, bits="W3A8", plan=plan, weight_levels=method.name, weight_granularity=granularity)
    weights = [tensor for tensor in student.tensors() if tensor.kind == "weight"]

    assert len(weights) == 9
    assert [tensor.kind for tensor in student.tensors()].count("bias") == 0
    for tensor in weights:
        assert isinstance(tensor.grid, Codebook)
        assert len(tensor.grid.levels) == (1 if granularity == "tensor" else shape_of(tensor.node)[0])
    assert {tensor.grid.bits for tensor in weights} == ({3} if plan == "zeroq" else {3, 8})


def test_a_student_is_nearer_than_with_even_levels(residual: Network, calibration: Samples, method: Method) -> None:
    uneven, even = (
        quantize(residual, calibration, bits="W2A8", plan="zeroq", weight_levels=levels) for levels in (method.name, "uniform")
    )
    assert distance(uneven, residual, calibration) < distance(even, residual, calibration)


def test_options_of_levels_reach_the_method(residual: Network, calibration: Samples) -> None:
    def levels(**options: object) -> list[Tensor]:
        student = quantize(residual, calibration, bits="W4A8", weight_levels="quartiles", level_options=options)
        return [tensor.grid.levels for tensor in student.tensors() if isinstance(tensor.grid, Codebook)]

    assert not all(torch.equal(a, b) for a, b in zip(levels(), levels(search=False, share=1.0), strict=True))
    with pytest.raises(OptionError, match="did you mean 'share'"):
        levels(shares=1.0)
    with pytest.raises(OptionError, match="unknown codebooks method 'quartils'; did you mean 'quartiles'"):
        quantize(residual, calibration, weight_levels="quartils")
