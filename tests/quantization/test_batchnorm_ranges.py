"""Ranges and corrections from BatchNorm statistics: what the paper says, of no sample, and near what samples would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.errors import OptionError
from dreamquant.exporters.export import export
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, is_input, tensor_of
from dreamquant.network.load import load
from dreamquant.network.notes import notes
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import Chunks, walk
from dreamquant.samples import Samples

SHAPE = (3, 9, 7)
FORM = {"range_source": "batchnorm", "bias_correction": "batchnorm"}


@pytest.fixture
def chain(fill: Callable[..., nn.Module]) -> Network:
    """Three convolutions with BatchNorm and ReLU, then a linear layer."""
    layers: list[nn.Module] = []
    for read, made in ((3, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(read, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    return capture(fill(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), SHAPE), SHAPE)


def distance(student: Student, network: Network, images: Tensor) -> float:
    expected = network(images)
    return ((student(images) - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("deviations", [3.0, 6.0])
def test_a_range_is_that_of_the_widest_channel(chain: Network, images: Callable[..., Tensor], deviations: float) -> None:
    samples = Samples(images(2, SHAPE))
    student = quantize(chain, samples, transforms=["fold_batchnorm"], range_source="batchnorm", deviations=deviations)
    layers = [node for node in student.network.graph.graph.nodes if notes(node).normal is not None]
    highs = [float((beta + deviations * gamma).max()) for beta, gamma in (notes(layer).normal for layer in layers)]
    grids = [t.grid for t in student.tensors() if t.kind == "activation" and t.node.name.startswith("relu")]
    image = next(t.grid for t in student.tensors() if is_input(t.node))

    assert [float(grid.scale * grid.qmax) for grid in grids] == pytest.approx(highs)
    assert all(float(grid.zero_point) == 0 for grid in grids)
    assert float(image.scale * 255) == pytest.approx(2 * deviations)


@pytest.mark.parametrize("plan", ["deploy", "zeroq", "brecq"])
def test_no_sample_is_looked_at(residual: Network, images: Callable[..., Tensor], plan: str) -> None:
    x = images(50, residual.input_shape, seed=77)
    transforms = ["fold_batchnorm", "equalize"]
    one, other = (
        quantize(residual, Samples(factor * images(4, residual.input_shape)), plan=plan, transforms=transforms, **FORM)  # type: ignore[arg-type]
        for factor in (1, 1e3)
    )
    assert torch.equal(one(x), other(x))
    assert distance(one, residual, x) < 0.2


def test_they_are_near_those_of_samples(chain: Network, images: Callable[..., Tensor]) -> None:
    samples, x = Samples(images(64, SHAPE, seed=5)), images(64, SHAPE, seed=6)
    free, seen = (quantize(chain, samples, bits="W8A6", range_source=source) for source in ("batchnorm", "samples"))
    assert distance(free, chain, x) < 1.5 * distance(seen, chain, x)
    narrow = quantize(chain, samples, bits="W8A6", range_source="batchnorm", deviations=0.5)
    assert distance(narrow, chain, x) > 3 * distance(free, chain, x)


def test_what_leads_into_a_leaky_relu_keeps_what_that_lets_through(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.01), nn.Conv2d(6, 4, 1))
    network = capture(fill(module, SHAPE), SHAPE)
    student = quantize(network, Samples(images(4, SHAPE)), bits="W8A4", range_source="batchnorm")
    layer = next(node for node in student.network.graph.graph.nodes if notes(node).normal is not None)
    beta, gamma = notes(layer).normal
    grid = next(t.grid for t in student.tensors() if t.node is layer)

    assert -float(grid.zero_point * grid.scale) > 0.5 * float((beta - 6 * gamma).min())


# --- corrections ------------------------------------------------------------------------------------------------------


def mean_errors(student: Student, images: Tensor) -> dict[str, float]:
    """By layer: the norm over channels of the mean error, relative to the output's deviation."""
    found = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        if str(node.target).startswith(("aten.conv", "aten.linear")):
            one, other = torch.cat(quantized), torch.cat(exact)
            axes = [axis for axis in range(one.dim()) if axis != 1]
            found[node.name] = ((one - other).mean(axes).norm() / other.std()).item()

    walk(student.network, images, after=after)
    return found


@pytest.mark.parametrize("bias", ["int32", "float"])
def test_the_mean_error_of_rounded_weights_goes(chain: Network, images: Callable[..., Tensor], bias: str) -> None:
    samples, x = Samples(images(8, SHAPE)), images(200, SHAPE, seed=4)
    form = {"bits": "W3A8", "weight_granularity": "tensor", "last_weight_bits": 3, "bias": bias}
    plain, corrected = (
        mean_errors(quantize(chain, samples, bias_correction=on, **form), x)  # type: ignore[arg-type]
        for on in ("none", "batchnorm")
    )
    assert len(corrected) == 4
    assert sum(plain.values()) > 0.5
    for name in list(corrected)[1:]:  # the image's mean is 0: the first layer has no mean error
        assert corrected[name] < 0.35 * plain[name]


def test_integer_biases_are_made_anew(chain: Network, images: Callable[..., Tensor]) -> None:
    student = quantize(chain, Samples(images(8, SHAPE)), bits="W3A8", **FORM)  # type: ignore[arg-type]
    grids = {tensor.quantizer: tensor.grid for tensor in student.tensors()}
    biases = [tensor for tensor in student.tensors() if tensor.kind == "bias"]

    assert len(biases) == 4
    for tensor in biases:
        layer = next(iter(tensor.quantizer.users))
        torch.testing.assert_close(tensor.grid.scale, grids[layer.args[0]].scale * grids[layer.args[1]].scale)  # type: ignore[index]
        stored = tensor_of(student.network.graph, tensor.node)
        assert (tensor.grid.fake(stored) - stored).abs().max() <= tensor.grid.scale.max()


def test_the_paper_in_whole(chain: Network, images: Callable[..., Tensor]) -> None:
    """One grid a weight on channels of uneven range: equalized, absorbed and corrected they cost a fraction."""
    with torch.no_grad():
        graph = chain.graph
        uneven = 10 ** torch.linspace(-1, 1, 6).view(-1, 1)
        norms = [node for node in graph.graph.nodes if "batch_norm" in node.name]
        for place in (1, 2):
            tensor_of(graph, norms[0].args[place]).mul_(uneven.flatten())
        reader = next(node for node in graph.graph.nodes if node.name == "conv2d_1")
        tensor_of(graph, reader.args[1]).div_(uneven.view(1, -1, 1, 1))
    samples, x = Samples(images(8, SHAPE)), images(100, SHAPE, seed=4)
    form = {"bits": "W6A8", "weight_granularity": "tensor"}
    plain = quantize(chain, samples, bias_correction="none", **form)  # type: ignore[arg-type]
    whole = quantize(chain, samples, transforms=["fold_batchnorm", "equalize", "absorb_bias"], **FORM, **form)  # type: ignore[arg-type]

    assert distance(whole, chain, x) < 0.4 * distance(plain, chain, x)


@pytest.mark.parametrize("source", ["torch", "onnx"])
@pytest.mark.parametrize("more", [[], ["split_channels"]])
def test_the_file_computes_the_same(
    residual: Network, residual_onnx: Path, calibration: Samples, tmp_path: Path, source: str, more: list[str]
) -> None:
    network = residual if source == "torch" else load(residual_onnx)
    transforms = ["fold_batchnorm", "equalize", "absorb_bias", *more]
    student = quantize(network, calibration, transforms=transforms, weight_granularity="tensor", **FORM)  # type: ignore[arg-type]
    export(student, tmp_path / "student.onnx", calibration)
    assert distance(student, residual, calibration.images) < 0.25


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["range_source", "bias_correction"])
def test_a_network_without_batchnorm_is_refused(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], field: str
) -> None:
    network = capture(fill(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), SHAPE), SHAPE)
    with pytest.raises(OptionError, match=f"{field}='batchnorm' needs BatchNorm statistics and the network has none"):
        quantize(network, Samples(images(4, SHAPE)), **{field: "batchnorm"})  # type: ignore[arg-type]


def test_tensors_without_a_range_are_named(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Softmax(1), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
    )
    network = capture(fill(module, SHAPE), SHAPE)
    with pytest.raises(
        OptionError, match=r"no range of softmax, relu, conv2d_2: .* followed through softmax \(aten.softmax.int\); use"
    ):
        quantize(network, Samples(images(4, SHAPE)), range_source="batchnorm")


def test_a_network_with_nothing_to_correct_is_refused(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(6))
    network = capture(fill(module, SHAPE), SHAPE)
    with pytest.raises(OptionError, match="bias_correction='batchnorm' can correct no layer"):
        quantize(network, Samples(images(4, SHAPE)), bias_correction="batchnorm")
