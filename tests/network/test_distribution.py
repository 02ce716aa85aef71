"""What BatchNorms tell of every activation is what is seen on the data that they know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.network.capture import capture
from dreamquant.network.distribution import Distribution, clip_ends, distributions, has_statistics
from dreamquant.network.graph import Network, aten, is_input, output_nodes, run_batched
from dreamquant.network.input_space import of_pixels
from dreamquant.network.interpreter import Values, interpret
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.student import prepare
from dreamquant.transform.equalize import equalize
from dreamquant.transform.fold_batchnorm import fold_batchnorm

SHAPE = (4, 6, 8)


class After(nn.Module):
    """A function of what a BatchNorm gives; the BatchNorm reads the image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.function = nn.BatchNorm2d(4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm(x))


def known(network: Network, deviations: float = 6.0) -> Distribution:
    """The distribution of a network's output."""
    return distributions(network, deviations=deviations)[output_nodes(network.graph.graph)[0]]


PRELU = torch.tensor([0.3, -0.2, 1.5, 0.0])
SCALE = torch.tensor([0.5, -1.0, 2.0, 3.0]).view(4, 1, 1)
ENDS = SCALE.abs()
EXACT: dict[str, Callable[[Tensor], Tensor]] = {  # element by element, of a normal variable
    "nothing": lambda x: x + 0.0,
    "relu": F.relu,
    "relu6": lambda x: F.relu6(8 * x),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.8),
    "clamp": lambda x: x.clamp(min=0.2),
    "clips in a row": lambda x: torch.minimum(F.hardtanh(x, 0.0, 1.5), ENDS),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.prelu(x, PRELU),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "silu, written out": lambda x: x * torch.sigmoid(x),
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "of stored tensors": lambda x: (x * SCALE - 1) / ENDS + SCALE,
    "relu of a scaled one": lambda x: F.relu(x * SCALE),
}


@pytest.fixture(scope="module", params=list(EXACT))
def exact(request: pytest.FixtureRequest, fill: Callable[..., nn.Module]) -> tuple[nn.Module, Network]:
    """Each module of `EXACT`, and its network."""
    module = fill(After(EXACT[request.param]), SHAPE)
    return module, capture(module, SHAPE)


def test_mean_and_deviation_are_those_of_a_normal_variable(
    exact: tuple[nn.Module, Network], images: Callable[..., Tensor]
) -> None:
    _, network = exact
    seen = network(images(4000, SHAPE, seed=3)).double()
    told = known(network)

    assert all(part.shape == (1, 4, 1, 1) for part in (told.mean, told.deviation, told.low, told.high))
    spread = seen.std((0, 2, 3)) + 0.01
    assert ((told.mean.flatten() - seen.mean((0, 2, 3))).abs() < 0.03 * spread).all()
    torch.testing.assert_close(told.deviation.flatten(), seen.std((0, 2, 3)), rtol=0.03, atol=1e-3)
    assert bool((told.low - 1e-3 <= seen).all())
    assert bool((seen <= told.high + 1e-3).all())


def test_ranges_are_the_functions_of_those_before(exact: tuple[nn.Module, Network]) -> None:
    module, network = exact
    told = known(network, deviations=2.5)
    beta, gamma = module.norm.bias.double(), module.norm.weight.abs().double()  # type: ignore[union-attr, operator]
    steps = torch.linspace(-2.5, 2.5, 5001, dtype=torch.float64).view(-1, 1)
    values = module.function((beta + gamma * steps).float().view(-1, 4, 1, 1))  # type: ignore[operator]

    torch.testing.assert_close(told.low.flatten(), values.amin((0, 2, 3)).double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(told.high.flatten(), values.amax((0, 2, 3)).double(), rtol=1e-3, atol=1e-3)


def test_of_no_deviation_is_the_functions_value() -> None:
    module = After(F.relu).eval()
    with torch.no_grad():
        module.norm.weight.zero_()
        module.norm.bias.copy_(torch.tensor([-1.0, 0.0, 2.0, 50.0]))
    told = known(capture(module, SHAPE))
    torch.testing.assert_close(told.mean.flatten(), torch.tensor([0.0, 0.0, 2.0, 50.0], dtype=torch.float64))
    torch.testing.assert_close(told.deviation.flatten(), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)


def shuffled(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 2, 6, 8).transpose(1, 2).reshape(-1, 4, 6, 8)


def halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([F.relu(other), one], 1)


MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: torch.flatten(x, 1),
    "shuffle": shuffled,
    "split": halves,
    "slice": lambda x: x[:, 1:, ::2],
    "select": lambda x: x[:, 2],
    "index": lambda x: x.index_select(1, torch.tensor([3, 0, 0, 2, 1])),
    "zeros around": lambda x: F.pad(x, (1, 1, 2, 0)),
    "zeros beside": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2),
    "channels last": lambda x: x.permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("name", list(MOVING))
def test_what_is_moved_keeps_its_statistics(name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    network = capture(fill(After(MOVING[name]), SHAPE), SHAPE)
    seen = network(images(6000, SHAPE, seed=3)).double()
    told = known(network)

    torch.testing.assert_close(told.mean.expand(1, *seen.shape[1:])[0], seen.mean(0), rtol=0, atol=0.08)
    torch.testing.assert_close(told.deviation.expand(1, *seen.shape[1:])[0], seen.std(0), rtol=0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("pool", "exact"),
    [
        (lambda x: F.avg_pool2d(x, 2), True),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), True),
        (lambda x: F.adaptive_avg_pool2d(x, 1), True),
        (lambda x: x.mean((2, 3)), True),
        (lambda x: F.max_pool2d(x, 2), False),
    ],
    ids=["average", "with zeros around", "adaptive", "mean", "maximum"],
)
def test_pooled_tensors_keep_within_bounds(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], pool: Callable[[Tensor], Tensor], exact: bool
) -> None:
    network = capture(fill(After(pool), SHAPE), SHAPE)
    seen = network(images(4000, SHAPE, seed=3)).double()
    told = known(network)
    if exact:
        torch.testing.assert_close(told.mean.expand(1, *seen.shape[1:])[0], seen.mean(0), rtol=0, atol=0.09)
    else:
        assert (told.mean < seen.mean((0, 2, 3), keepdim=True)).all()
    assert (told.deviation > seen.std(0)).all()
    assert (told.low <= seen).all()
    assert (seen <= told.high).all()


class Sides(nn.Module):
    """Two branches with BatchNorms of their own, joined."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join, self.one, self.other = join, nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(F.relu(self.one(x[:, :2])), self.other(x[:, 2:]))


@pytest.mark.parametrize(
    "join",
    [lambda x, y: x + y, lambda x, y: x * y, lambda x, y: x * torch.sigmoid(y), lambda x, y: torch.cat([y, x], 1)],
    ids=["sum", "product", "gate", "concatenation"],
)
def test_joined_tensors(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], join: Callable[[Tensor, Tensor], Tensor]
) -> None:
    network = capture(fill(Sides(join), SHAPE), SHAPE)
    seen = network(images(4000, SHAPE, seed=3)).double()
    told = known(network)
    torch.testing.assert_close(told.mean.flatten(), seen.mean((0, 2, 3)), rtol=0.02, atol=0.03)
    torch.testing.assert_close(told.deviation.flatten(), seen.std((0, 2, 3)), rtol=0.03, atol=0)
    assert (told.low <= seen).all()
    assert (seen <= told.high).all()


def test_the_range_of_a_sum_grows_as_deviations_do(fill: Callable[..., nn.Module]) -> None:
    """Sixteen independent summands have four times the range of one, not sixteen times."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=False) for _ in range(16))

        def forward(self, x: Tensor) -> Tensor:
            total = self.norms[0](x)
            for norm in self.norms[1:]:
                total = total + norm(x)
            result: Tensor = total
            return result

    told = known(capture(fill(Chain(), SHAPE), SHAPE))
    torch.testing.assert_close(told.high.flatten(), torch.full((4,), 24.0, dtype=torch.float64))


def everything(network: Network, x: Tensor) -> dict[str, Tensor]:
    values: Values = {}
    with torch.no_grad():
        interpret(network.graph, x, values=values, keep=True)
    return {node.name: value.double() for node, value in values.items() if isinstance(value, Tensor)}


class Whole(nn.Module):
    """A residual block, a concatenation, a gate, layers without BatchNorm, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(4, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv, self.norm = nn.Conv2d(7, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.left, self.right, self.right_norm = nn.Conv2d(7, 5, 1), nn.Conv2d(7, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.excite, self.depthwise, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.norm(self.conv(x)))
        x = torch.cat([F.leaky_relu(self.left(x), 0.1), F.relu(self.right_norm(self.right(x)))], 1)
        x = F.relu6(self.depthwise(x * torch.sigmoid(self.excite(x.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@pytest.mark.parametrize("fold", [True, False])
def test_a_whole_network_is_followed(fill: Callable[..., nn.Module], images: Callable[..., Tensor], fold: bool) -> None:
    network = capture(fill(Whole(), SHAPE), SHAPE)
    network = fold_batchnorm(network) if fold else network
    seen, told = everything(network, images(400, SHAPE, seed=12)), distributions(network)
    for node in network.graph.graph.nodes:
        if is_input(node) or node.op == "call_function":
            value, one = seen[node.name], told[node]
            axes = [axis for axis in range(value.dim()) if axis != 1]
            expected = one.mean.expand(1, *value.shape[1:]).mean(axes)
            assert ((expected - value.mean(axes)).abs() < 0.5 * value.std()).all(), node
            assert ((value < one.low) | (value > one.high)).double().mean() < 1e-3, node


def test_a_student_is_seen_through_its_quantizers(residual: Network) -> None:
    plain = distributions(fold_batchnorm(residual))
    student, _, _ = prepare(residual, load_plan("deploy"), parse_bits("W8A8"))
    told = {node.name: one for node, one in distributions(student.network).items()}

    assert {node.name for node in plain} <= set(told)
    assert any(node.op == "call_module" for node in distributions(student.network))
    for node, one in plain.items():
        assert torch.equal(one.mean, told[node.name].mean)
        assert torch.equal(one.high, told[node.name].high)


def test_clips_that_were_made_exact_are_followed(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Hardtanh(0.0, 0.8), nn.Conv2d(5, 3, 1))
    network = equalize(fold_batchnorm(capture(fill(module, SHAPE), SHAPE)), bits=8)
    cut = next(node for node in network.graph.graph.nodes if node.target is aten.minimum.default)
    seen, told = everything(network, images(500, SHAPE, seed=2))[cut.name], distributions(network)[cut]

    torch.testing.assert_close(told.mean.flatten(), seen.mean((0, 2, 3)), rtol=0.06, atol=0.02)
    torch.testing.assert_close(told.high.flatten(), seen.amax((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_a_layer_without_batchnorm_sums_its_inputs(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(72, 5))
    network = capture(fill(module, SHAPE), SHAPE)
    seen = everything(network, images(4000, SHAPE, seed=5))
    for node, one in distributions(network, deviations=3.0).items():
        value = seen[node.name]
        full = [part.expand(1, *value.shape[1:])[0] for part in (one.mean, one.deviation)]
        assert ((full[0] - value.mean(0)).abs() < 0.1 * value.std()).all(), node
        if node.target is aten.conv2d.default:
            torch.testing.assert_close(full[1], value.std(0), rtol=0.06, atol=0)
            torch.testing.assert_close(one.high, one.mean + 3 * one.deviation)


def test_what_enters_a_batchnorm_is_what_it_remembers(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Softmax(1), nn.BatchNorm2d(6), nn.ReLU(), nn.Hardtanh(0.0, 1.0), nn.BatchNorm2d(6)
    )
    network = capture(fill(module, SHAPE), SHAPE)
    seen, told = everything(network, images(2000, SHAPE, seed=5)), distributions(network)
    entering = [node for node in network.graph.graph.nodes if node.target in (aten.softmax.int, aten.hardtanh.default)]

    assert len(entering) == 2
    for node in entering:
        torch.testing.assert_close(told[node].mean.flatten(), seen[node.name].mean((0, 2, 3)), rtol=0.05, atol=0.02)
        torch.testing.assert_close(told[node].deviation.flatten(), seen[node.name].std((0, 2, 3)), rtol=0.1, atol=0)
    assert told[entering[1]].low.min() == 0
    assert told[entering[1]].high.max() <= 1


def test_what_cannot_be_followed_is_left_out(transformer: Network) -> None:
    told = {node.target for node in distributions(transformer)}
    assert aten.conv2d.default in told
    assert not told & {aten.layer_norm.default, aten.matmul.default, aten.softmax.int}


def test_images_have_the_range_of_pixels(fill: Callable[..., nn.Module]) -> None:
    module = fill(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (3, 6, 8))
    network = replace(capture(module, (3, 6, 8)), space=of_pixels((0.5, 0.4, 0.0), (0.5, 0.2, 1.0)))
    image = next(iter(distributions(network).values()))
    torch.testing.assert_close(image.low.flatten(), torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(image.high.flatten(), torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64))
    unknown = next(iter(distributions(capture(module, (3, 6, 8)), deviations=4.0).values()))
    assert (unknown.low.min(), unknown.high.max()) == (-4, 4)


def test_whether_there_are_statistics(residual: Network, transformer: Network) -> None:
    assert has_statistics(residual.graph.graph)
    assert has_statistics(fold_batchnorm(residual).graph.graph)
    assert not has_statistics(transformer.graph.graph)


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (F.relu, (0.0, math.inf)),
        (F.relu6, (0.0, 6.0)),
        (F.hardtanh, (-1.0, 1.0)),
        (lambda x: F.hardtanh(x, -2.0, 0.5), (-2.0, 0.5)),
        (lambda x: x.clamp(min=0.5), (0.5, math.inf)),
        (lambda x: x.clamp(max=3), (-math.inf, 3.0)),
        (lambda x: x.clamp(min=-1, max=3), (-1.0, 3.0)),
        (lambda x: x.clamp_min(0.0), (0.0, math.inf)),
    ],
)
def test_ends_of_clips(function: Callable[[Tensor], Tensor], ends: tuple[float, float]) -> None:
    node = output_nodes(capture(After(function).eval(), SHAPE).graph.graph)[0]
    assert clip_ends(node) == ends


def test_batches_of_one_size_are_no_matter(fill: Callable[..., nn.Module]) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(x)).reshape(2, 4, 2, 3, 8).reshape(16, 24)
            result: Tensor = self.last(x)
            return result

    torch.manual_seed(0)
    module = Windows()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(2, *SHAPE))
    network = capture(module.eval(), SHAPE)
    told = known(network)
    (seen,) = run_batched(network.graph, torch.randn(2, *SHAPE), 2)
    assert told.mean.shape[-1] == seen.shape[-1]
    assert all(bool((one <= other).all()) for one, other in pairwise([told.low, told.mean, told.high]))
