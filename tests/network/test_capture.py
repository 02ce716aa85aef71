"""Modules and programs become one flat graph that computes what they compute, and stay as they were."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import ModelError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, aten, input_node, output_nodes, tensor_of
from dreamquant.network.notes import is_tensor, notes, shape_of

SHAPE = (3, 9, 6)


class Function(nn.Module):
    """A function of images and of a small convolution."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Any]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer)


class Vision(nn.Module):
    """A transformer with a class token that is repeated over the batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 3, stride=3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.zeros(1, 7, 12))
        self.encoder = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True, **options)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y: Tensor = self.head(self.encoder(x)[:, 0])
        return y


def attention(x: Tensor, layer: nn.Module, **options: Any) -> Tensor:
    tokens = layer(x).flatten(2).transpose(1, 2).reshape(x.shape[0], 54, 2, 2).transpose(1, 2)
    y: Tensor = F.scaled_dot_product_attention(tokens, 0.5 * tokens, tokens + 1, **options)
    return y.transpose(1, 2).reshape(x.shape[0], -1)


SPELLINGS = {
    aten.view.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.clone.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.scaled_dot_product_attention.default,
    aten._assert_tensor_metadata.default,
}
MASK = torch.ones(54, 54).tril().bool()


def write_parts(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    y[:, :2] = y[:, :2].relu()
    y[:, 1:-1] += 0.5
    y[:, -1] *= 2
    y[:, :, 1::2] -= x[:, :1, 1::2]
    y[..., -3:] = 0.25
    y[y < -0.5] = -0.5
    return y


class Counter(nn.Module):
    """Counts in a buffer how often it ran, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("ran", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        y: Tensor = self.batch_norm(self.layer(x.clone().mul_(2)))
        return y


MODULES: dict[str, Callable[[], nn.Module]] = {
    "in place": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Hardswish(inplace=True)),
    "clipped": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.7)),
    "dropped": lambda: nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.ReLU()),
    "normalised": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)),
    "encoder": Vision,
    "attention": lambda: Function(attention),
    "attention, masked": lambda: Function(lambda x, f: attention(x, f, attn_mask=MASK)),
    "views": lambda: Function(lambda x, f: f(x).view(x.size(0), 2, -1).permute(0, 2, 1).contiguous().view(len(x), -1)),
    "casts": lambda: Function(lambda x, f: f(x.to(torch.float32)).float().clone().detach()),
    "split": lambda: Function(lambda x, f: torch.cat([part * 2 for part in f(x).chunk(2, 1)], 1)),
    "same size": lambda: Function(lambda x, f: F.conv2d(x, f.weight, padding="same")),
    "written into parts": lambda: Function(write_parts),
    "all of it": lambda: Function(lambda x, f: f(x)[:, :, :99, 0:][..., :6]),
    "einsum": lambda: Function(lambda x, f: torch.einsum("nchw,ndhw->ncd", f(x), f(x * 2))),
    "einsum of heads": lambda: Function(lambda x, f: torch.einsum("nhcd,nhce->nhed", *f(x).view(-1, 2, 2, 9, 6).unbind(1))),
    "einsum of one": lambda: Function(lambda x, f: torch.einsum("nchw->nwc", f(x))),
    "random slope": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU(0.1, 0.4), nn.AlphaDropout()),
    "counter": Counter,
    "written in place": lambda: Function(lambda x, f: f(x).add_(1).mul_(x.sum(1, keepdim=True)).clamp_(0, 2)),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_the_graph_computes_what_the_module_does_on_any_batch(
    name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    module = fill(MODULES[name](), SHAPE)
    network = capture(module, SHAPE)

    assert network.batch is None
    assert not SPELLINGS & {node.target for node in network.graph.graph.nodes}  # every operation has one
    for count in (1, 3, 5):
        x = images(count, SHAPE, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(network(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dropped", "normalised", "in place"])
def test_the_module_is_left_as_it_was(name: str, fill: Callable[..., nn.Module]) -> None:
    module = fill(MODULES[name](), SHAPE)
    for index, part in enumerate(module.modules()):
        part.training = index % 2 == 0
    training = [part.training for part in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in module.parameters()]
    generator = torch.random.get_rng_state()
    network = capture(module, SHAPE)

    assert [part.training for part in module.modules()] == training
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == gradients
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not any(tensor.requires_grad for tensor in network.graph.buffers())


def test_the_network_does_not_share_the_modules_weights(residual_module: nn.Module, residual: Network) -> None:
    theirs = {tensor.data_ptr() for tensor in residual_module.state_dict().values()}

    assert not theirs & {tensor.data_ptr() for tensor in residual.graph.buffers()}


def test_the_graph_is_flat_and_every_tensor_has_a_shape(residual: Network) -> None:
    graph = residual.graph.graph

    assert {node.op for node in graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    assert shape_of(input_node(graph)) == (2, 3, 11, 9)
    assert shape_of(output_nodes(graph)[0]) == (2, 5)
    for node in graph.nodes:
        assert node.op == "output" or is_tensor(node)
        if node.op == "get_attr":
            assert tensor_of(residual.graph, node).shape == shape_of(node)


def test_tensors_remember_their_names(residual_module: nn.Module, residual: Network) -> None:
    state = residual_module.state_dict()
    found = {notes(node).origin: node for node in residual.graph.graph.nodes if node.op == "get_attr"}

    assert set(found) == {name for name in state if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor_of(residual.graph, node), state[name]) for name, node in found.items())


def test_batchnorms_stay_and_run_in_evaluation(residual: Network) -> None:
    norms = [node for node in residual.graph.graph.nodes if node.target is aten.batch_norm.default]

    assert len(norms) == 5
    assert all(node.args[5] is False for node in norms)


def test_a_tensor_that_is_used_twice_is_stored_once() -> None:
    network = capture(Function(lambda x, f: f(x) + f(x * 2)), SHAPE)

    assert sorted(str(node.target) for node in network.graph.graph.nodes if node.op == "get_attr") == [
        "layer_bias",
        "layer_weight",
    ]


# --- precisions, wrappers, batches ----------------------------------------------------------------------------------


class Within(nn.Module):
    """Computes within autocast, in place of its own precision."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=self.dtype):
            y = self.module(x)
        return y.float()


class As(nn.Module):
    """Casts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def masked(x: Tensor, layer: nn.Module) -> Tensor:
    y: Tensor = layer(x)
    return torch.full_like(y, torch.finfo(y.dtype).min).where(y < -1, y).clamp(torch.finfo(y.dtype).min).softmax(1)


PRECISE: dict[str, tuple[Callable[[nn.Sequential], nn.Module], str, int]] = {
    "half": (lambda module: module.half(), "float16", 1),
    "bfloat16": (lambda module: module.bfloat16(), "float32", 2),
    "double": (lambda module: module.double(), "float32", 2),
    "mixed": (lambda module: nn.Sequential(module[0].half(), As(torch.float32), module[1], As(torch.float64)), "float16", 1),
    "cast inside": (lambda module: nn.Sequential(As(torch.float64), module.double(), As(torch.float32)), "float32", 1),
    "autocast": (lambda module: Within(module, torch.bfloat16), "float32", 1),
    "autocast in half": (lambda module: Within(module, torch.float16), "float32", 1),
}


@pytest.mark.parametrize("name", list(PRECISE))
def test_other_precisions_become_float32(name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    make, dtype, remarks = PRECISE[name]
    module = fill(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), SHAPE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # numbers that all of them have
        for buffer in module.buffers():
            buffer.copy_(buffer.bfloat16())
        expected = module(images(3, SHAPE))
    network = capture(make(module), SHAPE)

    assert network.space.dtype == dtype
    assert len(network.remarks) == remarks
    assert all(tensor.dtype == torch.float32 for tensor in network.graph.buffers())
    torch.testing.assert_close(network(images(3, SHAPE)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_least_number_of_another_precision_is_one(dtype: torch.dtype, images: Callable[..., Tensor]) -> None:
    network = capture(Function(masked).to(dtype), SHAPE)

    assert network(images(3, SHAPE)).isfinite().all()


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "for several devices": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "both": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled inside": lambda module: nn.Sequential(torch.compile(module, backend="eager")),
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_wrappers_are_taken_off(name: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = fill(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), SHAPE)
    network = capture(WRAPPED[name](module), SHAPE)

    assert network.batch is None
    torch.testing.assert_close(network(images(3, SHAPE)), module(images(3, SHAPE)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [lambda x, f: f(x) / f(x).abs().max(), lambda x, f: f(x) - f(x).mean(0)],
    ids=["one value of a batch", "one mean of a batch"],
)
def test_a_module_whose_images_know_of_each_other_takes_them_one_by_one(
    function: Callable[[Tensor, nn.Module], Tensor], images: Callable[..., Tensor]
) -> None:
    module, x = Function(function), images(3, SHAPE)
    network = capture(module, SHAPE)

    assert network.batch == 1
    assert "one by one" in network.remarks[0]
    with torch.no_grad():
        torch.testing.assert_close(network(x), torch.cat([module(one) for one in x[:, None]]), rtol=1e-4, atol=1e-5)


# --- exported programs ----------------------------------------------------------------------------------------------


def program(module: nn.Module, batch: int, *, free: bool = False) -> torch.export.ExportedProgram:
    """As it comes back from a file."""
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), (torch.zeros(batch, *SHAPE),), dynamic_shapes=shapes), file)
        file.seek(0)
        return torch.export.load(file)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_program_of_one_batch_size_is_freed(batch: int, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    module = fill(Vision(), SHAPE)
    network = capture(program(module, batch))

    assert network.batch is None
    assert network.input_shape == SHAPE
    for count in (1, 3, 5):
        x = images(count, SHAPE)
        torch.testing.assert_close(network(x), module(x), rtol=1e-4, atol=1e-5)


def test_a_program_that_cannot_be_freed_is_run_in_its_own_batches(images: Callable[..., Tensor]) -> None:
    module = Function(lambda x, f: f(x - x.mean(0)).mean((2, 3))).eval()
    network = capture(program(module, 4))
    x = images(7, SHAPE)

    assert network.batch == 4
    assert network(x).shape == (7, 4)
    torch.testing.assert_close(network(x)[:4], module(x[:4]), rtol=1e-4, atol=1e-5)


def test_a_program_in_core_operators_is_read_as_any_other(fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    layers = [
        nn.Conv2d(3, 4, 3, groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        nn.Conv2d(6, 6, (1, 3), groups=6),
    ]
    module = fill(nn.Sequential(*layers), SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = capture(program(module, 2, free=True).run_decompositions())
    targets = [node.target for node in network.graph.graph.nodes if node.op == "call_function"]
    x = images(3, SHAPE)

    assert targets == [
        aten.conv2d.default,
        aten.batch_norm.default,
        aten.relu.default,
        aten.conv_transpose2d.input,
        aten.conv2d.default,
    ]
    torch.testing.assert_close(network(x), module(x), rtol=1e-4, atol=1e-5)


def test_a_program_for_another_size_is_refused() -> None:
    given = program(Function(lambda x, f: f(x)), 2)
    with pytest.raises(ModelError, match=r"exported for images \(3, 9, 6\), not \(3, 8, 8\)"):
        capture(given, (3, 8, 8))


# --- what is no network -------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


BROKEN: dict[str, tuple[nn.Module, str]] = {
    "another size": (nn.Linear(7, 2), "cannot trace it on images"),
    "two inputs": (TwoInputs(), "cannot trace it on images"),
    "random": (Function(lambda x, f: f(x) + torch.randn_like(x[:, :1])), "draws random numbers"),
    "decided by values": (
        Function(lambda x, f: torch.cond(x.sum() > 0, f, lambda y: y.mean(1, True).tile(1, 4, 1, 1), (x,))),
        "depends on values",
    ),
    "of the batch": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "statistics of the batch"),
    "no parameters yet": (nn.Sequential(nn.LazyConv2d(4, 3)), "cannot trace it"),
    "not finite": (Function(lambda x, f: f(x) * torch.tensor(float("nan"))), "values of .* are NaN or infinite"),
    "branches on data": (Function(lambda x, f: f(x) if x.sum() > 0 else x), "cannot trace it"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_no_network_of_images_is_said_in_one_line(name: str) -> None:
    module, message = BROKEN[name]
    with pytest.raises(ModelError, match=message) as caught:
        capture(module, SHAPE)
    assert type(module).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ModelError, match="a TorchScript module cannot be exported"):
        capture(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.zeros(1, *SHAPE)), SHAPE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_counted(value: float) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        module[0].weight[0, 0, 0, :2] = value
    with pytest.raises(ModelError, match=r"2 of 108 values of .*weight are NaN or infinite"):
        capture(module, SHAPE)


def test_a_module_does_not_tell_the_size_of_its_images() -> None:
    with pytest.raises(ModelError, match="Sequential: .*give input_shape"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 3)))
