"""Attention is found by what it computes, in whichever form a network has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dreamquant.network.attention import attentions, patch_similarity, probe_attention
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, Source, aten
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.onnx_import import load_onnx

SHAPE = (3, 12, 8)


@pytest.fixture(scope="module")
def transformer_onnx(transformer_module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Network:
    path: Path = tmp_path_factory.mktemp("transformer") / "transformer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            transformer_module,
            (torch.zeros(2, *SHAPE),),
            path,
            opset_version=17,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )
    return load_onnx(path)


@pytest.fixture(params=["torch", "onnx"])
def network(request: pytest.FixtureRequest, transformer: Network, transformer_onnx: Network) -> Network:
    return transformer if request.param == "torch" else transformer_onnx


def watched(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What each `scaled_dot_product_attention` of a module returns."""
    seen: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        module(x)
    return seen


def test_both_forms_give_each_patch_behind_attention_without_the_class_token(
    network: Network, transformer_module: nn.Module, images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(4, SHAPE)
    scores, layers = probe_attention(network)(x)

    assert [(layer.first, layer.patches) for layer in attentions(network)] == [(1, 6)] * 2
    torch.testing.assert_close(scores, transformer_module(x), rtol=1e-4, atol=1e-5)
    for patches, expected in zip(layers, watched(transformer_module, x, monkeypatch), strict=True):
        torch.testing.assert_close(patches, expected.mean(1)[:, 1:], rtol=1e-4, atol=1e-5)


def test_one_node_for_all_of_attention_is_found_too(images: Callable[..., Tensor]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    tokens = graph.call_function(aten.flatten.using_ints, (x, 2))
    graph.output((graph.call_function(aten.scaled_dot_product_attention.default, (tokens,) * 3),))
    module = fx.GraphModule(nn.Module(), graph)
    record_shapes(module, torch.zeros(2, 3, 5, 4))
    network = Network(module, (3, 5, 4), Source("module", "one node"))

    assert [(layer.output.target, layer.patches) for layer in attentions(network)] == [
        (aten.scaled_dot_product_attention.default, 3)
    ]
    x = images(2, (3, 5, 4))
    scores, (patches,) = probe_attention(network)(x)
    torch.testing.assert_close(patches, scores)  # one head, taken out of the batch axis


class Mixing(nn.Module):
    """Patches, what is given, and a mean over what comes out."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, 4, 2, 2), mix
        self.project = nn.Linear(4, 4)
        self.many = nn.MultiheadAttention(4, 2, batch_first=True)
        self.table = nn.Parameter(torch.linspace(-1, 1, 6 * 24).view(6, 24))
        self.register_buffer("mask", torch.arange(24) % 5 == 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y: Tensor = self.mix(self, x).flatten(1)
        return y


def windows(m: Mixing, x: Tensor) -> Tensor:
    x = x.reshape(-1, 1, 6, 4)  # four windows of six patches
    return torch.matmul(torch.softmax(torch.matmul(x, x.transpose(-2, -1)) / 2 + m.table[:, :6], -1), x).reshape(-1, 24, 4)


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, int, int]]] = {  # with the shape of patches of three images
    "bmm": (lambda _, x: torch.bmm(torch.softmax(torch.bmm(x, x.transpose(1, 2)) * 0.5, 2), x), (3, 24, 4)),
    "masked": (
        lambda m, x: torch.softmax((x @ x.mT).masked_fill(m.mask, -1e9), -1) @ x,
        (3, 24, 4),
    ),
    "multi-head": (lambda m, x: m.many(x, x, x)[0], (3, 24, 2)),
    "windows": (windows, (12, 6, 4)),
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "scores from a layer": lambda m, x: torch.softmax(F.linear(x, m.table[:, :4]), -1) @ x[:, :6],
    "stored keys": lambda m, x: torch.softmax(x @ m.table[:4], -1) @ x,
    "stored values": lambda m, x: torch.softmax(x @ x.mT, -1) @ m.table.mT,
    "no softmax": lambda _, x: (x @ x.mT) @ x,
    "softmax along queries": lambda _, x: torch.softmax(x @ x.mT, 1) @ x,
    "two patches": lambda _, x: F.scaled_dot_product_attention(x[:, :2], x, x),
}


@pytest.mark.parametrize("form", FORMS)
def test_spellings_of_attention(form: str, fill: Callable[..., nn.Module], images: Callable[..., Tensor]) -> None:
    mix, shape = FORMS[form]
    network = capture(fill(Mixing(mix), SHAPE), SHAPE)
    _, (patches,) = probe_attention(network)(images(3, SHAPE))

    assert patches.shape == shape


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_self_attention_over_patches(other: str, fill: Callable[..., nn.Module]) -> None:
    assert attentions(capture(fill(Mixing(OTHERS[other]), SHAPE), SHAPE)) == []


def test_a_network_without_has_none(residual: Network) -> None:
    assert attentions(residual) == []


def test_similarities_are_cosines_of_each_pair(images: Callable[..., Tensor]) -> None:
    patches = images(2, (4, 3))
    expected = F.cosine_similarity(patches.unsqueeze(1), patches.unsqueeze(2), dim=3)

    torch.testing.assert_close(
        patch_similarity(patches),
        torch.stack([expected[:, i, j] for i in range(4) for j in range(i + 1, 4)], 1),
    )
