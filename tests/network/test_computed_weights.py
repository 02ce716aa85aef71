"""Layers whose weights are computed from parameters are layers with stored weights, in every way that people compute them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import dreamquant
from dreamquant.errors import ModelError
from dreamquant.network.capture import capture
from dreamquant.network.notes import notes
from dreamquant.quantization.sites import weighted_nodes

SHAPE = (3, 7, 6)


class Net(nn.Module):
    """A layer between two others."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.middle(F.relu(self.stem(x)))).mean((2, 3)))


class Layer(nn.Conv2d):
    """A convolution that a function of itself and its input computes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.function = function
        self.small, self.gain = nn.Parameter(torch.ones(4, 4, 1, 1)), nn.Parameter(torch.full((4, 1, 1, 1), 0.3))
        self.wide = nn.Parameter(torch.linspace(-0.3, 0.3, 6 * 5 * 9).view(6, 5, 3, 3))
        self.matrix = nn.Parameter(torch.linspace(-0.3, 0.3, 16).view(4, 4))
        self.register_buffer("levels", torch.arange(-72, 72, dtype=torch.int8).view(4, 4, 3, 3))
        self.register_buffer("index", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def on(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def standardised(layer: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(layer.weight, (1, 2, 3), keepdim=True)
    return layer.on(x, layer.gain * (layer.weight - mean) * torch.rsqrt(var + 1e-5), layer.bias)


def normalised(layer: Any, x: Tensor) -> Tensor:
    """As scaled weight standardisation is written: by a BatchNorm of the weight."""
    weight = F.batch_norm(layer.weight.reshape(1, 4, -1), None, None, layer.gain.flatten(), training=True)
    return layer.on(x, weight.reshape_as(layer.weight), layer.bias)


def quantized_in_training(layer: Any, x: Tensor) -> Tensor:
    step = layer.weight.abs().amax() / 7
    return layer.on(x, layer.weight + ((layer.weight / step).round() * step - layer.weight).detach(), layer.bias)


def parametrized() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(layer, name, Twice())
    return layer


def convolution() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "weight norm, hook": lambda: weight_norm(convolution()),
    "weight norm": lambda: parametrizations.weight_norm(convolution()),
    "spectral norm, hook": lambda: spectral_norm(convolution()),
    "spectral norm": lambda: parametrizations.spectral_norm(convolution()),
    "orthogonal": lambda: parametrizations.orthogonal(convolution()),
    "parametrized": parametrized,
    "standardised": lambda: Layer(standardised),
    "normalised": lambda: Layer(normalised),
    "re-parametrised": lambda: Layer(lambda f, x: f.on(x, f.weight + F.pad(f.small, [1] * 4), f.bias + f.gain.flatten())),
    "equalised learning rate": lambda: Layer(lambda f, x: f.on(x, f.weight * 0.1, f.bias * 0.5)),
    "slimmable": lambda: Layer(lambda f, x: f.on(x, f.wide[:4, :4], f.bias[: x.shape[1]])),
    "cast": lambda: Layer(lambda f, x: f.on(x, f.weight.double().to(x.dtype), f.bias.type_as(x))),
    "stored as integers": lambda: Layer(lambda f, x: f.on(x, f.levels.float() * (f.gain / 72))),
    "quantized in training": lambda: Layer(quantized_in_training),
    "chosen": lambda: Layer(lambda f, x: f.on(x, torch.stack([f.weight, -f.weight])[f.index])),
    "scaled by a number that is read": lambda: Layer(lambda f, x: f.on(x, f.weight * f.index.item())),
    "bias of the image": lambda: Layer(lambda f, x: f.on(x, f.weight, x[0].mean((1, 2)))),
    "matrix": lambda: Layer(lambda f, x: (x.permute(0, 2, 3, 1) @ f.matrix.softmax(0)).permute(0, 3, 1, 2)),
    "matrix from the left": lambda: Layer(lambda f, x: (f.matrix @ x.flatten(2)).view_as(x)),
    "einsum": lambda: Layer(lambda f, x: torch.einsum("nchw,oc->nohw", x, f.matrix)),
    "einsum from the left": lambda: Layer(lambda f, x: torch.einsum("oc, nchw -> nohw", f.matrix, x)),
    "einsum over two axes": lambda: Layer(
        lambda f, x: torch.einsum("nchw,cwd->ndh", x, f.weight.reshape(4, 6, 6)[..., :4])[..., None]
    ),
    "addmm": lambda: Layer(lambda f, x: torch.addmm(f.bias, x.mean((2, 3)), f.matrix)[..., None, None]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", list(MIDDLES))
def test_computed_weights_are_stored(name: str, images: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    module, x = Net(MIDDLES[name]()).eval(), images(3, SHAPE)
    with torch.no_grad():
        expected = torch.cat([module(one) for one in x[:, None]])
    network = capture(module, SHAPE)
    nodes = network.graph.graph.nodes

    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert len(weighted_nodes(network.graph.graph)) == 3
    assert all(any(source.op != "get_attr" for source in node.all_input_nodes) for node in nodes if node.op == "call_function")
    assert {node.target for node in nodes if node.op == "get_attr"} == {name for name, _ in network.graph.named_buffers()}


@pytest.mark.parametrize("batch", [1, 4])
def test_so_they_are_in_a_program_of_one_batch_size(batch: int, images: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    middle = nn.Sequential(Layer(standardised), parametrizations.weight_norm(convolution()), MIDDLES["einsum"]())
    module, x = Net(middle).eval(), images(3, SHAPE)
    network = capture(torch.export.export(module, (images(batch, SHAPE),)))

    assert network.batch is None
    assert len(weighted_nodes(network.graph.graph)) == 5
    torch.testing.assert_close(network(x), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_stored_weight_has_the_name_of_the_parameter_that_it_was_computed_from() -> None:
    for name in ("weight norm, hook", "weight norm", "spectral norm", "parametrized", "equalised learning rate"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = capture(Net(MIDDLES[name]()), SHAPE)
        weight, bias = weighted_nodes(network.graph.graph)[1].args[1:3]
        assert [notes(node).origin for node in (weight, bias)] == ["middle.weight", "middle.bias"]


def test_a_weight_that_is_computed_twice_is_stored_once() -> None:
    layer = parametrizations.weight_norm(convolution())
    network = capture(Net(nn.Sequential(layer, nn.ReLU(), layer)), SHAPE)
    first, second = (node.args[1] for node in weighted_nodes(network.graph.graph)[1:3])

    assert first is second


def test_weights_that_are_no_numbers_once_computed_are_refused() -> None:
    layer = Layer(lambda f, x: f.on(x, f.weight / (f.small - f.small)))
    with pytest.raises(ModelError, match=r"Net: 144 of 144 values of middle are NaN or infinite once they are computed"):
        capture(Net(layer), SHAPE)


def test_a_file_of_computed_weights_proves_itself_and_says_what_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixed = Layer(lambda f, x: f.on(x[:1], f.weight + x[:1, :, :3, :3].mean() * f.small) + x)  # a weight of the image
    middle = nn.Sequential(parametrizations.weight_norm(convolution()), Layer(standardised), MIDDLES["einsum"](), mixed)
    settings = ["synthesis.count=4", "synthesis.held_out=4"]
    options: dict[str, Any] = {"input_shape": SHAPE, "pixels": "none", "settings": settings, "estimate": False}
    for plan, left in (("deploy", []), ("zeroq", ["conv2d_3"])):  # that weight is an activation, where these are quantized
        result = dreamquant.run(Net(middle), tmp_path / "net.onnx", plan=plan, **options)

        assert sum(tensor.kind == "weight" for tensor in result.student.tensors()) == 5
        assert result.assessment.float_layers == left
        assert result.summary()["remarks"] == list(result.network.remarks)
