"""Generators give images of any size, start from torch's own weights, and draw from no generator but the one given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.synthesis._generators import ClassGenerator, ConditionalNorm, LatentGenerator, LongRange, bare, conv, initialised

KINDS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = [
    (nn.Conv2d, (6, 4, 3), {}),
    (nn.Conv2d, (6, 6, 5), {"groups": 6, "dilation": 3}),
    (nn.Conv2d, (6, 4, 3), {"bias": False}),
    (nn.Linear, (7, 9), {}),
    (nn.Embedding, (5, 8), {}),
]
MAKERS: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {
    "latent": lambda shape: LatentGenerator(shape, 10, 6),
    "batchnorm": lambda shape: ClassGenerator(shape, 4, 10, 6),
    "embedding": lambda shape: ClassGenerator(shape, 4, 10, 6, by_embedding=True),
    "attention": lambda shape: ClassGenerator(shape, 4, 10, 6, attention=True),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dream(maker: nn.Module, latents: Tensor) -> Tensor:
    given = (latents,) if isinstance(maker, LatentGenerator) else (latents, torch.arange(len(latents)) % 4)
    found: Tensor = maker(*given)
    return found


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """`make(shape=(3, 11, 9), seed=0)`: a generator with its first weights."""
    return lambda shape=(3, 11, 9), seed=0: initialised(MAKERS[request.param](shape), seeded(seed))


@pytest.mark.parametrize(("kind", "arguments", "options"), KINDS)
def test_weights_are_those_that_torch_itself_draws(
    kind: type[nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = kind(*arguments, **options).state_dict()
    found = initialised(bare(kind, *arguments, **options), seeded(5)).state_dict()

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_fill_the_bounds() -> None:
    layer = initialised(conv(16, 64), seeded(0))
    bound = (16 * 9) ** -0.5

    assert layer.bias is not None
    for values in (layer.weight, layer.bias):
        assert 0.9 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_a_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(make: Callable[..., nn.Module]) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (make(seed=seed) for seed in (1, 1, 2))

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 11, 9), (2, 5, 14), (4, 3, 2)])
def test_images_have_the_size_and_the_statistics_of_the_input(
    make: Callable[..., nn.Module], shape: tuple[int, int, int]
) -> None:
    images = dream(make(shape), torch.randn((8, 10), generator=seeded(0)))

    assert images.shape == (8, *shape)
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * shape[0], abs=1e-4)
    assert images.std((0, 2, 3), correction=0).tolist() == pytest.approx([1.0] * shape[0], abs=0.1)


def test_everything_learns(make: Callable[..., nn.Module]) -> None:
    maker, latents = make(), torch.randn((8, 10), generator=seeded(0)).requires_grad_()
    dream(maker, latents)[:, :, 2:5, 3:6].square().sum().backward()  # type: ignore[no-untyped-call]

    assert latents.grad is not None
    assert bool(latents.grad.any())
    for name, parameter in maker.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("kind", ["batchnorm", "embedding", "attention"])
def test_the_class_changes_the_image(kind: str) -> None:
    maker = initialised(MAKERS[kind]((3, 11, 9)), seeded(0))
    for part in maker.modules():
        if isinstance(part, ConditionalNorm) and kind != "embedding":
            torch.nn.init.normal_(part.shift, generator=seeded(1))
    latents = torch.randn((8, 10), generator=seeded(0))
    one, other = (maker(latents, torch.full((8,), label)) for label in (0, 3))

    assert (one - other).square().mean() > 0.05


def test_conditional_norm_starts_as_batchnorm_and_keeps_classes_apart() -> None:
    x, labels = torch.randn((6, 3, 4, 5), generator=seeded(0)), torch.tensor([0, 1, 0, 1, 1, 0])
    norm, plain = ConditionalNorm(3, 2, 0.8), nn.BatchNorm2d(3, eps=0.8)
    expected = plain(x)
    torch.testing.assert_close(norm(x, labels), expected)

    with torch.no_grad():
        norm.scale[1], norm.shift[1] = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, -1.0])
    changed = norm(x, labels)
    torch.testing.assert_close(changed[labels == 0], expected[labels == 0])
    scaled = expected * torch.tensor([2.0, 1.0, 0.0]).view(3, 1, 1) + torch.tensor([0.0, 5.0, -1.0]).view(3, 1, 1)
    torch.testing.assert_close(changed[labels == 1], scaled[labels == 1])


class TestLongRange:
    def test_without_weights_that_leave_it_is_the_identity(self) -> None:
        block, x = initialised(LongRange(4), seeded(0)), torch.randn((2, 4, 9, 7), generator=seeded(1))
        assert (block(x) - x).abs().max() > 1e-3

        with torch.no_grad():
            for parameter in block.leave.parameters():
                parameter.zero_()
        assert torch.equal(block(x), x)

    def test_it_reaches_eleven_pixels_and_no_farther(self) -> None:
        block = initialised(LongRange(4), seeded(0)).double()
        x = torch.randn((1, 4, 29, 31), generator=seeded(1)).double().requires_grad_()
        block(x)[0, :, 14, 15].sum().backward()
        assert x.grad is not None
        rows, columns = torch.nonzero(x.grad.abs().sum((0, 1)), as_tuple=True)

        # 5 pixels, then 7 of them 3 apart: 5 + 6 * 3 = 23
        assert (rows.min().item(), rows.max().item()) == (14 - 11, 14 + 11)
        assert (columns.min().item(), columns.max().item()) == (15 - 11, 15 + 11)
        assert len(rows) == 23 * 23  # and leaves none out


@pytest.mark.parametrize(("latent", "width"), [(0, 6), (10, 0), (-1, 6)])
def test_impossible_sizes_are_refused(latent: int, width: int) -> None:
    for build in (
        lambda: LatentGenerator((3, 8, 8), latent, width),
        lambda: ClassGenerator((3, 8, 8), 4, latent, width),
    ):
        with pytest.raises(OptionError, match=f"latent is {latent} and width is {width}"):
            build()
