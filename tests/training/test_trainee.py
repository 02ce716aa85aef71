"""A student as a module: it computes what the student does, its gradients are the float ones, its grids follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.network.graph import Network, tensor_of
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import walk
from dreamquant.samples import Samples
from dreamquant.training._trainee import ActivationQuantizer, Trainee, WeightQuantizer, learnt_nodes


def shaken(student: Student, amount: float = 0.3) -> Trainee:
    """A trainee whose parameters have all moved."""
    trainee, generator = Trainee(student), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter += amount * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return trainee


@pytest.mark.parametrize("plan", ["zeroq", "brecq", "deploy"])
def test_untrained_it_computes_what_the_student_does(residual: Network, calibration: Samples, plan: str) -> None:
    student = quantize(residual, calibration, bits="W4A4", plan=plan)
    trainee = Trainee(student)
    torch.testing.assert_close(trainee.answers(calibration.images)[0], student(calibration.images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trainee.student()(calibration.images), student(calibration.images))


def test_what_is_learnt_is_weights_biases_and_batchnorms(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W4A4", plan="zeroq")
    names = {str(node.target) for node in learnt_nodes(student.network.graph)}
    assert names == {name for name, _ in student.network.graph.named_buffers() if name.endswith(("weight", "bias"))}
    trainee = Trainee(student)
    trainee(calibration.images)[0].sum().backward()
    assert len(list(trainee.parameters())) == len(names)
    assert all(parameter.grad is not None for parameter in trainee.parameters())


def test_at_eight_bits_gradients_are_the_float_networks(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W8A8", plan="zeroq")
    trainee, plain = Trainee(student), Trainee(student)
    for name in (*plain.weights, *plain.ranges):
        setattr(plain.graph, name, torch.nn.Identity())
    labels = torch.arange(len(calibration)) % 5
    for one in (trainee, plain):
        F.cross_entropy(one(calibration.images)[0], labels).backward()
    for (name, one), other in zip(trainee.named_parameters(), plain.parameters(), strict=True):
        assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weights_grid_follows_it_and_its_gradient_is_the_identity(symmetric: bool) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    low, high = weight.flatten(1).aminmax(dim=1)
    module = WeightQuantizer(weight, grid_of_range(low, high, bits=3, symmetric=symmetric, axis=0), None)
    moved = (2 * weight + 0.1).requires_grad_()
    expected = grid_of_range(*moved.detach().flatten(1).aminmax(dim=1), bits=3, symmetric=symmetric, axis=0)

    torch.testing.assert_close(module(moved), expected.fake(moved.detach()))
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (module(moved) * pull).sum().backward()
    assert torch.equal(moved.grad, pull)


def test_a_narrowed_range_keeps_its_share(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W2A4", plan="brecq")
    trainee = Trainee(student)
    shares = torch.cat([module.share for module in trainee.weights.values()])
    assert (shares < 0.99).any()
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter *= 3
    for before, after in zip(student.tensors(), trainee.student().tensors(), strict=True):
        if before.kind == "weight":
            assert isinstance(before.grid, Grid)
            assert isinstance(after.grid, Grid)
            torch.testing.assert_close(after.grid.scale, 3 * before.grid.scale)


def test_levels_of_a_codebook_stay() -> None:
    levels = Codebook(torch.tensor([[-1.0, -0.1, 0.0, 0.5]]))
    weight = torch.linspace(-2, 2, 60).view(5, 3, 2, 2).requires_grad_()
    module = WeightQuantizer(weight.detach(), levels, None)
    assert module.found(weight) is levels
    result = module(weight)
    assert result.unique().tolist() == levels.levels[0].tolist()
    (3 * result).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))


def test_what_sixteen_bits_cannot_overflow_on_still_cannot(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W8A8", plan="deploy")
    trained = shaken(student, amount=1.0).student()
    seen = 0
    for tensor in trained.tensors():
        layer = next(iter(tensor.quantizer.users))
        if tensor.kind == "weight" and not (len(layer.args) > 6 and layer.args[6] != 1):
            rows = tensor.grid.integers(tensor_of(trained.network.graph, tensor.node)).flatten(1)
            pairs = rows[:, : rows.shape[1] // 2 * 2].reshape(len(rows), -1, 2)
            assert pairs.clamp(min=0).sum(-1).max() <= 128
            assert (-pairs).clamp(min=0).sum(-1).max() <= 128
            seen += 1
    assert seen > 4


def test_running_ranges_are_a_mean_that_counts_the_first_batches_in_full() -> None:
    module = ActivationQuantizer(grid_of_range(torch.tensor(0.0), torch.tensor(99.0), bits=4, symmetric=False))
    module.observing = True
    batches = [torch.linspace(-1.0 - step, 4.0 + 3 * step, 11) for step in range(5)]
    weights = torch.tensor([0.9 ** (4 - step) for step in range(5)])
    for batch in batches:
        module.batch = None
        module(batch)
    ends = torch.stack([torch.stack(batch.aminmax()) for batch in batches])
    low, high = (weights.unsqueeze(1) * ends).sum(0) / weights.sum()
    torch.testing.assert_close(module.grid.scale, grid_of_range(low, high, bits=4, symmetric=False).scale)

    module.observing = False
    held = module.grid
    module(1000 * batches[0])
    assert module.grid is held


def test_what_passes_in_one_batch_counts_once_however_often_a_grid_stands() -> None:
    once, twice = (
        ActivationQuantizer(grid_of_range(torch.tensor(0.0), torch.tensor(1.0), bits=4, symmetric=False)) for _ in range(2)
    )
    for module, pieces in ((once, [torch.linspace(-3, 5, 9)]), (twice, [torch.linspace(-3, 1, 5), torch.linspace(1, 5, 5)])):
        module.observing = True
        for _ in range(3):
            module.batch = None
            for piece in pieces:
                module(piece)
    assert torch.equal(once.grid.scale, twice.grid.scale)
    assert torch.equal(once.grid.zero_point, twice.grid.zero_point)
    assert once.steps == twice.steps == 3


def test_the_gradient_passes_where_a_range_ends() -> None:
    module = ActivationQuantizer(grid_of_range(torch.tensor(0.0), torch.tensor(1.0), bits=4, symmetric=False))
    x = torch.linspace(-2, 3, 50).requires_grad_()
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach().aminmax(), (torch.tensor(0.0), torch.tensor(1.0)))
    assert torch.equal(x.grad, torch.ones(50))


def test_a_state_taken_up_gives_the_same_student(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W3A3", plan="zeroq")
    trainee, other = shaken(student), Trainee(student)
    trainee.observe(True)
    trainee.answers(calibration.images)
    other.restore(trainee.state())
    assert torch.equal(trainee.student()(calibration.images), other.student()(calibration.images))
    assert not torch.equal(student(calibration.images), other.student()(calibration.images))


@pytest.mark.parametrize("plan", ["zeroq", "deploy"])
def test_the_float_network_stays_beside_the_trained_one(residual: Network, calibration: Samples, plan: str) -> None:
    trained = shaken(quantize(residual, calibration, bits="W3A3", plan=plan)).student()
    ends: list[Tensor] = []

    def after(node: object, quantized: list[Tensor], exact: list[Tensor]) -> None:
        ends[:] = [torch.cat(quantized), torch.cat(exact)]

    walk(trained.network, calibration.images, after=after)
    torch.testing.assert_close(ends[0], trained(calibration.images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[1], residual(calibration.images), rtol=1e-4, atol=1e-4)
