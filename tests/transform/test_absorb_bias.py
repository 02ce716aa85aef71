"""Absorption keeps the function where activations stay high, and narrows their range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import OptionError
from dreamquant.exporters.export import export
from dreamquant.network.capture import capture
from dreamquant.network.distribution import distributions
from dreamquant.network.edit import bias_of
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.notes import notes
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.samples import Samples
from dreamquant.transform.absorb_bias import absorb_bias
from dreamquant.transform.fold_batchnorm import fold_batchnorm

SHAPE = (3, 8, 6)
BETA = torch.tensor([9.0, 2.0, 30.0, -9.0, 0.0, 12.0])


@pytest.fixture
def high(fill: Callable[..., nn.Module]) -> Callable[..., Network]:
    """`high(between, last)`: folded; its first layer's channels are N(BETA, about 1), of which three hardly ever fall to 0."""

    def build(between: nn.Module, last: nn.Module) -> Network:
        norm = nn.BatchNorm2d(6)
        module = fill(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, between, last), SHAPE)
        with torch.no_grad():
            norm.bias.copy_(BETA)
        return fold_batchnorm(capture(module, SHAPE))

    return build


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4 * other.abs().max())


def biases(network: Network) -> list[Tensor | None]:
    return [bias_of(network.graph, layer) for layer in weighted_nodes(network.graph.graph)]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "relu": (nn.ReLU, lambda: nn.Conv2d(6, 4, 3)),
    "no bias behind": (nn.ReLU, lambda: nn.Conv2d(6, 4, 3, bias=False)),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), lambda: nn.Conv2d(6, 4, 1)),
    "depthwise": (nn.ReLU, lambda: nn.Conv2d(6, 6, 3, groups=6)),
    "grouped": (nn.ReLU, lambda: nn.Conv2d(6, 4, 3, groups=2)),
    "pooling": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), lambda: nn.Conv2d(6, 4, 1)),
    "linear": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), lambda: nn.Linear(144, 4)),
    "averaged": (lambda: nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda: nn.Linear(6, 4)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_function_is_kept_and_activations_fall(
    name: str, high: Callable[..., Network], images: Callable[..., Tensor]
) -> None:
    between, last = CASES[name]
    before = high(between(), last())
    after = absorb_bias(before, bits=8)
    beta, gamma = notes(weighted_nodes(before.graph.graph)[0]).normal
    surplus = (beta - 3 * gamma).clamp(min=0)
    x = 0.5 * images(16, SHAPE, seed=4)  # no farther than three deviations from the mean

    assert int((surplus > 1).sum()) == 3
    assert close(after(x), before(x))
    normal = notes(weighted_nodes(after.graph.graph)[0]).normal
    torch.testing.assert_close(normal[0], beta - surplus)
    torch.testing.assert_close(normal[1], gamma)
    ranges = [distributions(net)[weighted_nodes(net.graph.graph)[0]].high.max() for net in (before, after)]
    assert ranges[1] < 0.4 * ranges[0]

    far = images(64, SHAPE, seed=5)  # as the BatchNorm knows them
    assert (after(far) - before(far)).std() < 0.005 * before(far).std()


def test_layers_that_pad_are_left_out_unless_asked_for(high: Callable[..., Network], images: Callable[..., Tensor]) -> None:
    before = high(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    x = 0.5 * images(4, SHAPE)
    kept, padded = absorb_bias(before, bits=8)(x), absorb_bias(before, bits=8, padded=True)(x)
    expected = before(x)

    assert torch.equal(kept, expected)
    assert close(padded[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])
    assert not close(padded, expected)


@pytest.mark.parametrize(
    ("between", "last"),
    [
        (nn.ReLU6(), nn.Conv2d(6, 4, 1)),
        (nn.Identity(), nn.Conv2d(6, 4, 1)),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), nn.Conv2d(6, 4, 1)),
        (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1)), nn.Conv2d(6, 4, 3)),
        (nn.ReLU(), nn.Conv2d(6, 4, 3, padding="same")),
        (nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)),
    ],
    ids=["relu6", "nothing", "a pooling that pads", "zeros", "same", "transposed"],
)
def test_what_would_not_be_the_same_function_is_left_out(
    high: Callable[..., Network], between: nn.Module, last: nn.Module
) -> None:
    before = high(between, last)
    after = absorb_bias(before, bits=8)
    for one, other in zip(biases(after), biases(before), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_a_network_without_statistics_is_refused(fill: Callable[..., nn.Module], residual: Network) -> None:
    never = capture(fill(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)), SHAPE), SHAPE)
    with pytest.raises(OptionError, match=r"absorb_bias needs the statistics of BatchNorms .* came without, or with them folded"):
        absorb_bias(never, bits=8)
    with pytest.raises(OptionError, match="put fold_batchnorm before it"):
        absorb_bias(residual, bits=8)


class PreActivation(nn.Module):
    """Sums that BatchNorms follow, and layers that none follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = x + self.second(torch.relu(self.norm(x)))
        return y


def test_a_network_whose_norms_belong_to_no_layer_is_not_told_to_fold_them(fill: Callable[..., nn.Module]) -> None:
    folded = fold_batchnorm(capture(fill(PreActivation(), SHAPE), SHAPE))
    with pytest.raises(OptionError, match=r"""leave absorb_bias out: --set quantization.transforms='\["fold_batchnorm","""):
        absorb_bias(folded, bits=8)


@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_the_file_computes_the_same(
    residual: Network, residual_onnx: Path, calibration: Samples, tmp_path: Path, source: str
) -> None:
    network = residual if source == "torch" else load(residual_onnx)
    layers = {node.name: node for node in fold_batchnorm(network).graph.graph.nodes if notes(node).normal is not None}
    assert layers
    student = quantize(
        network,
        calibration,
        transforms=["fold_batchnorm", "equalize", "absorb_bias"],
        transform_options={"equalize": {"clip": "skip"}, "absorb_bias": {"padded": True}},
    )
    export(student, tmp_path / "student.onnx", calibration)
    assert (student.network.source.proto is None) == (source == "torch")


@pytest.mark.parametrize("bias", [True, False])
def test_the_file_of_a_network_with_high_biases(
    high: Callable[..., Network], images: Callable[..., Tensor], tmp_path: Path, bias: bool
) -> None:
    samples = Samples(images(16, SHAPE))
    form = {"placement": "layer_inputs", "quantize_image": False, "bias": "float", "last_input_bits": None}
    plain, absorbed = (
        quantize(high(nn.ReLU(), nn.Conv2d(6, 4, 3, bias=bias)), samples, bits="W8A4", transforms=transforms, **form)  # type: ignore[arg-type]
        for transforms in ([], ["absorb_bias"])
    )
    export(absorbed, tmp_path / "student.onnx", samples)
    expected = high(nn.ReLU(), nn.Conv2d(6, 4, 3, bias=bias))(samples.images)
    assert (absorbed(samples.images) - expected).std() < 0.6 * (plain(samples.images) - expected).std()
