"""The losses against their definitions, and where they must agree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.training._losses import Decoupled, Plain, decoupled, distillation

N, CLASSES = 9, 6
LABELS = torch.arange(N) % CLASSES


def scores(seed: int, classes: int = CLASSES) -> Tensor:
    return 3 * torch.randn(N, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_is_the_divergence_of_softened_probabilities(temperature: float) -> None:
    student, teacher = scores(0), scores(1)
    p, q = ((one.double() / temperature).softmax(1) for one in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()

    found = distillation(student, teacher, temperature=temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    averaged = distillation(student, teacher, temperature=temperature, reduction="mean")
    torch.testing.assert_close(CLASSES * averaged, found)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_decoupled_is_plain_distillation_when_beta_is_what_the_teacher_leaves_the_other_classes(
    temperature: float, classes: int
) -> None:
    student, teacher, labels = scores(0, classes), scores(1, classes), torch.arange(N) % classes
    left = 1 - (teacher / temperature).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    found = decoupled(student, teacher, labels, temperature=temperature, beta=left)

    torch.testing.assert_close(found, distillation(student, teacher, temperature=temperature))
    other = decoupled(student, teacher, labels, temperature=temperature, beta=8.0)
    assert (other > 1.5 * found) == (classes > 2)  # of two classes, there is no knowledge among the others


def test_the_parts_are_those_of_the_definition() -> None:
    student, teacher = scores(2), scores(3)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    rows = torch.arange(N)
    binary = [torch.stack([one[rows, LABELS], 1 - one[rows, LABELS]], 1) for one in (p, q)]
    target = (binary[0] * (binary[0] / binary[1]).log()).sum(1).mean()
    others = []
    for one in (p, q):
        rest = one.clone()
        rest[rows, LABELS] = 0
        others.append(rest / rest.sum(1, keepdim=True))
    terms = others[0] * (others[0] / others[1]).log()
    terms[rows, LABELS] = 0

    found = [
        decoupled(student, teacher, LABELS, temperature=1.0, alpha=alpha, beta=beta).double()
        for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (0.5, 8.0))
    ]
    torch.testing.assert_close(found[0], target, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], terms.sum(1).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], 0.5 * found[0] + 8 * found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_certainty_leaves_everything_finite(size: float) -> None:
    teacher = torch.full((2, 4), -size)
    teacher[:, 0] = size
    student = (-teacher).clone().requires_grad_()
    labels = torch.tensor([0, 3])
    loss = decoupled(student, teacher, labels, temperature=1.0, beta=8.0)
    loss.backward()

    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert student.grad.isfinite().all()
    same = decoupled(teacher, teacher, labels, temperature=1.0, beta=8.0)
    assert same.item() == 0


def test_students_losses_are_cross_entropy_and_their_distillation() -> None:
    student, teacher = scores(4), scores(5)
    entropy = F.cross_entropy(student, LABELS)
    torch.testing.assert_close(
        Plain(0.5, 20.0, "mean")(student, teacher, LABELS),
        entropy + 0.5 * distillation(student, teacher, temperature=20.0, reduction="mean"),
    )
    torch.testing.assert_close(
        Decoupled(1.0, 8.0, 2.0)(student, teacher, LABELS),
        entropy + decoupled(student, teacher, LABELS, temperature=2.0, alpha=1.0, beta=8.0),
    )


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown reduction 'men'; did you mean 'mean'"):
        Plain(1.0, 20.0, "men")
    for make in (lambda: Plain(1.0, 0.0), lambda: Decoupled(1.0, 8.0, -1.0), lambda: Decoupled(1.0, 8.0, float("nan"))):
        with pytest.raises(OptionError, match="temperature is"):
            make()
