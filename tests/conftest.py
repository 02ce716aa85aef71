"""Fixtures that several rooms share: small networks with odd sizes, and images for them."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import dreamquant  # noqa: F401  (before torch, as users have it: OpenMP's threads do not spin while they wait)

# isort: split
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import exported_program
from torch.nn import functional as F

from dreamquant.assess import latency
from dreamquant.cli import main
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, Source
from dreamquant.samples import Samples

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
RESIDUAL_SHAPE = (3, 11, 9)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Options of a session that asks for no number of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the networks are too small for more, and workers share the cores
    onnxruntime.SessionOptions = OneThread
    # half the time that torch.export needs for a small network: a walk over all operators there are, and the annotations of
    # 11,000 functions, which collections.abc makes anew and typing has kept
    exported_program._collect_all_valid_cia_ops = functools.cache(exported_program._collect_all_valid_cia_ops)
    torch._ops.Callable = typing.Callable  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at its million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """Files are timed in a tenth of the time; a module that is about times has a fixture of this name that does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_SAMPLE_SECONDS", 0.0005)
        patch.setattr(latency, "_WARM_UP_SECONDS", 0.005)
        yield


@functools.cache
def _captured(load: Callable[..., Network]) -> Network:
    return load(DIGITS / "digits.pt2", None, None, False)


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> Iterator[None]:
    """The trained example is read from its archive once, and copied from then on: half of what a short run on it takes. The
    tests of a folder that is about reading networks have a fixture of this name that does nothing."""
    reading = sys.modules["dreamquant.network.load"]
    load = reading._load

    def once(model: object, *options: object) -> Network:
        if not isinstance(model, str | os.PathLike) or options != (None, None, False):
            return load(model, *options)
        text = os.fspath(model)
        if not text.endswith("digits.pt2") or Path(text).resolve() != DIGITS / "digits.pt2":
            return load(model, *options)
        network = _captured(load)
        return replace(network, graph=copy.deepcopy(network.graph), source=Source("pt2", text, Path(text)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_load", once)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real networks and images: DREAMQUANT_DATA, or beside the repository; skips where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("DREAMQUANT_DATA", default))
    if not folder.is_dir():
        pytest.skip("needs real networks: set DREAMQUANT_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def digits() -> Path:
    """The folder of the trained example network."""
    return DIGITS


def draw_images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def draw_weights(module: nn.Module, shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, LAYERS):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
                part.weight.mul_((2 / part.weight[0].numel()) ** 0.5)
                if part.bias is not None:
                    part.bias.copy_(0.2 * torch.randn(part.bias.shape, generator=generator))
            elif isinstance(part, NORMS):
                part.momentum = None  # the plain mean over what it sees
                if part.affine:
                    part.weight.copy_(0.5 + torch.rand(part.weight.shape, generator=generator))
                    part.bias.copy_(0.3 * torch.randn(part.bias.shape, generator=generator))
        module.train()
        module(draw_images(64, shape, seed + 1))
    return module.eval()


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """`images(count, shape, seed=0)`: normal noise (count, *shape)."""
    return draw_images


@pytest.fixture(scope="session")
def fill() -> Callable[..., nn.Module]:
    """`fill(module, shape, seed=0)`: random weights, BatchNorms that know the noise that passes them, eval mode."""
    return draw_weights


class Residual(nn.Module):
    """What networks are made of, once each: a residual block, a concatenation, a gate, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv1, self.norm1 = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.norm2 = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.left = nn.Conv2d(7, 5, 1)
        self.right, self.right_norm = nn.Conv2d(7, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 2)
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        x = torch.cat([F.leaky_relu(self.left(x), 0.1), F.relu(self.right_norm(self.right(x)))], 1)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu6(self.depthwise_norm(self.depthwise(x)))
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@pytest.fixture(scope="session")
def residual_module() -> nn.Module:
    """A `Residual` for images (3, 11, 9); not to be changed."""
    return draw_weights(Residual(), RESIDUAL_SHAPE)


@pytest.fixture(scope="session")
def residual(residual_module: nn.Module) -> Network:
    """The same, captured."""
    return capture(residual_module, RESIDUAL_SHAPE)


TRANSFORMER_SHAPE = (3, 12, 8)


class Transformer(nn.Module):
    """Two blocks of attention over six patches and a class token."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.linspace(-1, 1, width).view(1, 1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        n, tokens, width = x.shape
        for norm, mix, project in zip(self.norms, self.mixes, self.projections, strict=True):
            q, k, v = mix(norm(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
            x = x + F.gelu(project(mixed))
        logits: Tensor = self.head(x[:, 0])
        return logits


@pytest.fixture(scope="session")
def transformer_module() -> nn.Module:
    """A `Transformer` for images (3, 12, 8); not to be changed."""
    return draw_weights(Transformer(), TRANSFORMER_SHAPE)


@pytest.fixture(scope="session")
def transformer(transformer_module: nn.Module) -> Network:
    """The same, captured."""
    return capture(transformer_module, TRANSFORMER_SHAPE)


@pytest.fixture(scope="session")
def residual_onnx(residual_module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an ONNX file of opset 11 with its BatchNorms, from `pixels` to `scores`."""
    path = tmp_path_factory.mktemp("residual") / "residual.onnx"
    with warnings.catch_warnings():  # the exporter that can write opset 11 announces that there is a newer one
        warnings.simplefilter("ignore")
        torch.onnx.export(
            residual_module,
            (torch.zeros(2, *RESIDUAL_SHAPE),),
            path,
            opset_version=11,
            dynamo=False,
            input_names=["pixels"],
            output_names=["scores"],
            dynamic_axes={"pixels": {0: "batch"}},
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    return path


@pytest.fixture(scope="session")
def calibration() -> Samples:
    """Images for `residual`."""
    return Samples(draw_images(40, RESIDUAL_SHAPE, seed=9))


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit status and what it wrote on the terminal's two streams."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`command("quantize", "model.onnx", ...)`: the command line's entry point, in this process."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["dreamquant", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        written = capfd.readouterr()
        return Finished(int(end.value.code or 0), written.out, written.err)

    return run
