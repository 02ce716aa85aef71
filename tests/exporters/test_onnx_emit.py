"""`emit`: what ONNX Runtime computes from the model is what torch computes from the graph, for every operator known."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dreamquant.errors import ModelError, OptionError, UnsupportedOperator
from dreamquant.exporters.onnx_emit import emit
from dreamquant.network.capture import flatten
from dreamquant.network.graph import aten, input_node, needed_by, output_nodes, tensor_of
from dreamquant.network.interpreter import record_shapes
from dreamquant.network.notes import exported_value, notes, set_notes
from dreamquant.network.operators import data_nodes

SHAPE = (4, 12, 10)


class Apply(nn.Module):
    """A function of a batch of images, and of layers with weights."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, seed: int = 1) -> nn.Module:
    """Weights from a generator of its own, running variances positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.3
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return module.eval()


def captured(module: nn.Module, shape: tuple[int, int, int]) -> fx.GraphModule:
    """The flat graph of a module, its batch free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        any_batch = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(module.eval(), (images(2, shape),), dynamic_shapes=any_batch)
    graph = flatten(program)
    record_shapes(graph, images(2, shape))
    return graph


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_same(
    graph: fx.GraphModule, shape: tuple[int, int, int], *, opset: int = 17, batch: int | None = None
) -> onnx.ModelProto:
    """Emit, check and run beside torch, on one image and on three where the batch is free."""
    model = emit(graph, input_shape=shape, batch=batch, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    runtime = session(model)
    for count in (1, 3) if batch is None else (batch,):
        x = images(count, shape)
        with torch.no_grad():
            expected = graph(x)
        expected = expected if isinstance(expected, tuple | list) else (expected,)
        found = runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
    assert_named(graph, model)
    return model


def assert_named(graph: fx.GraphModule, model: onnx.ModelProto) -> None:
    """Every tensor that depends on the images has a name of its own, and every name is in the model."""
    names = {value for node in model.graph.node for value in node.output}
    names |= {tensor.name for tensor in model.graph.initializer} | {value.name for value in model.graph.input}
    live = needed_by(output_nodes(graph.graph))
    assert [node for node in data_nodes(graph.graph) if node in live and notes(node).origin is None] == []
    found = [notes(node).origin for node in graph.graph.nodes if notes(node).origin is not None]
    assert set(found) <= names
    assert len(found) == len(set(found))


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


# groups of functions of images (N, 4, 12, 10) and of their layers; a group is captured as one network
Case = tuple[Callable[..., Any], list[nn.Module]]
GROUPS: dict[str, dict[str, Case]] = {
    "layers": {
        "conv": (lambda x, c: c(x), [nn.Conv2d(4, 6, 3, 2, 1)]),
        "conv_no_bias_dilated_groups": (lambda x, c: c(x), [nn.Conv2d(4, 8, (3, 2), dilation=2, groups=4, bias=False)]),
        "conv_same": (lambda x, c: c(x), [nn.Conv2d(4, 5, (4, 3), padding="same", dilation=2)]),
        "conv_valid": (lambda x, c: c(x), [nn.Conv2d(4, 5, 3, padding="valid")]),
        "conv1d": (lambda x, c: c(x.flatten(2)), [nn.Conv1d(4, 6, 5, 2, 2)]),
        "conv3d": (lambda x, c: c(x.unsqueeze(2)), [nn.Conv3d(4, 6, (1, 3, 3))]),
        "conv_transpose": (lambda x, c: c(x), [nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)]),
        "conv_transpose_groups": (lambda x, c: c(x), [nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2, dilation=2)]),
        "convolution": (
            lambda x, c: aten.convolution.default(x, c.weight, c.bias, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
            [nn.Conv2d(4, 6, 3)],
        ),
        "convolution_transposed": (
            lambda x, c: aten.convolution.default(x, c.weight, c.bias, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
            [nn.ConvTranspose2d(4, 6, 3)],
        ),
        "linear": (lambda x, fc: fc(x.flatten(1)), [nn.Linear(480, 7)]),
        "linear_no_bias": (lambda x, fc: fc(x.flatten(1)), [nn.Linear(480, 7, bias=False)]),
        "linear_4d": (lambda x, fc: fc(x), [nn.Linear(10, 7)]),
        "linear_4d_no_bias": (lambda x, fc: fc(x), [nn.Linear(10, 7, bias=False)]),
        "linear_shared_by_ranks": (lambda x, fc: (fc(x), fc(x.flatten(0, 2))), [nn.Linear(10, 7)]),
        "linear_on_computed_weight": (lambda x, fc: F.linear(x, fc.weight * 2), [nn.Linear(10, 7)]),
        "addmm": (
            lambda x, fc: torch.addmm(fc.bias, x.flatten(1), fc.weight.t(), beta=0.5, alpha=2),
            [nn.Linear(480, 7)],
        ),
        "baddbmm": (lambda x: torch.baddbmm(x[:, 0, :, :1], x[:, 0], x[:, 1].transpose(1, 2), beta=0.5, alpha=2), []),
        "matmul": (lambda x: x @ x.mT, []),
        "bmm": (lambda x: torch.bmm(x[:, 0], x[:, 1].transpose(1, 2)), []),
        "einsum": (lambda x: torch.einsum("nchw,nkhw->nck", x, x), []),
    },
    "norms": {
        "batch_norm": (lambda x, n: n(x), [nn.BatchNorm2d(4)]),
        "batch_norm_plain": (lambda x, n: n(x), [nn.BatchNorm2d(4, affine=False)]),
        "batch_norm_1d": (lambda x, n: n(x.mean((2, 3))), [nn.BatchNorm1d(4)]),
        "group_norm": (lambda x, n: n(x), [nn.GroupNorm(2, 4)]),
        "group_norm_plain": (lambda x, n: n(x), [nn.GroupNorm(2, 4, affine=False)]),
        "instance_norm": (lambda x, n: n(x), [nn.InstanceNorm2d(4, affine=True)]),
        "instance_norm_plain": (lambda x, n: n(x), [nn.InstanceNorm2d(4)]),
        "instance_norm_running": (lambda x, n: n(x), [nn.InstanceNorm2d(4, track_running_stats=True)]),
        "layer_norm": (lambda x, n: n(x), [nn.LayerNorm(10)]),
        "layer_norm_2d": (lambda x, n: n(x), [nn.LayerNorm((12, 10), bias=False)]),
        "layer_norm_plain": (lambda x, n: n(x), [nn.LayerNorm(10, elementwise_affine=False)]),
        "rms_norm": (lambda x, n: n(x), [nn.RMSNorm(10)]),
        "local_response_norm": (lambda x: F.local_response_norm(x, 3), []),
    },
    "activations": {
        "relu": (lambda x: F.relu(x), []),
        "relu6": (lambda x: F.relu6(4 * x), []),
        "hardtanh": (lambda x: F.hardtanh(x), []),
        "hardswish": (lambda x: F.hardswish(4 * x), []),
        "hardsigmoid": (lambda x: F.hardsigmoid(4 * x), []),
        "silu": (lambda x: F.silu(x), []),
        "gelu": (lambda x: F.gelu(x), []),
        "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), []),
        "elu": (lambda x: F.elu(x, 0.7), []),
        "elu_scales": (lambda x: aten.elu.default(x, 0.7, 1.5, 2.0), []),
        "selu": (lambda x: F.selu(x), []),
        "celu": (lambda x: F.celu(x, 0.7), []),
        "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), []),
        "leaky_relu_default": (lambda x: F.leaky_relu(x), []),
        "prelu": (lambda x, p: p(x), [nn.PReLU(4)]),
        "prelu_one": (lambda x, p: p(x), [nn.PReLU()]),
        "prelu_vectors": (lambda x, p: p(x[:, :, 0, 0]), [nn.PReLU(4)]),
        "sigmoid_tanh": (lambda x: torch.sigmoid(x) + torch.tanh(x), []),
        "softplus": (lambda x: F.softplus(x), []),
        "softplus_beta": (lambda x: F.softplus(20 * x, beta=2, threshold=10), []),
        "mish": (lambda x: F.mish(x), []),
        "log_sigmoid": (lambda x: F.logsigmoid(x), []),
        "softsign_tanhshrink": (lambda x: F.softsign(x) + F.tanhshrink(x), []),
        "glu": (lambda x: F.glu(x, 1), []),
        "softmax": (lambda x: F.softmax(x, 1), []),
        "log_softmax": (lambda x: F.log_softmax(x, -1), []),
    },
    "arithmetic": {
        "add_alpha": (lambda x: torch.add(x, x.abs(), alpha=2) + 1.5, []),
        "sub_alpha": (lambda x: torch.sub(x, x.abs(), alpha=0.5) - 2, []),
        "rsub": (lambda x: 3 - x, []),
        "rsub_tensor": (lambda x: torch.rsub(x, x.abs(), alpha=2), []),
        "mul_div": (lambda x: x * 2 / 3 / (x.abs() + 1), []),
        "div_floor_trunc": (
            lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.7, rounding_mode="trunc"),
            [],
        ),
        "pow": (lambda x: x**2 + x.abs() ** 0.75 + x.abs().pow(x) + 2**x, []),
        "unary": (
            lambda x: (-x).exp() + (x.abs() + 1).log() + x.abs().sqrt() + x.sin() * x.cos() + x.sign() + x.tan().atan(),
            [],
        ),
        "unary_more": (lambda x: (x.abs() + 0.5).rsqrt() + (x.abs() + 0.5).reciprocal() + x.erf() + x.square(), []),
        "rounding": (lambda x: (3 * x).floor() + (3 * x).ceil() + (3 * x).round(), []),
        "clamp": (lambda x: x.clamp(-0.5, 1) + x.clamp(min=0) + x.clamp(max=0.3), []),
        "clamp_min_max": (lambda x: aten.clamp_min.default(x, -0.2) + aten.clamp_max.default(x, 0.3), []),
        "maximum_minimum": (lambda x: torch.maximum(x, -x) + torch.minimum(x, 2 * x), []),
        "where": (lambda x: torch.where(x > 0, x, 0.1 * x) + torch.where(x < 0.5, 0.0, x), []),
        "comparisons": (lambda x: ((x >= 0) & (x <= 1)).float() + (x != 0) * x + (x > x.abs() - 0.1).to(x.dtype), []),
        "compare_integers": (lambda x: torch.where((3 * x).round().long() == 2, x, -x), []),
        "masked_fill": (lambda x: x.masked_fill(~(x > 0), -1.0), []),
        "logical": (lambda x: torch.where((x > 1) | (x < -1) ^ (x > -2) | x.isnan(), x, 0.0), []),
        "remainders": (lambda x: x.fmod(0.7) + x % 0.7 + (9 * x).long() % 4, []),
        "clamp_to_tensors": (lambda x: x.clamp(x.mean(1, True), x[:1].amax(1, True)) + F.threshold(x, 0.1, 20.0), []),
        "integer_arithmetic": (lambda x: (3 * x).long() * 2 + torch.arange(10), []),
    },
    "parts": {
        "cat": (lambda x: torch.cat([x, x.relu(), x], 1), []),
        "cat_dtypes": (lambda x: torch.cat([x, x.long()], -1), []),
        "stack": (lambda x: torch.stack([x, -x], -1), []),
        "split": (lambda x: [part * 2 for part in x.split(5, 3)][1] + torch.split(x, [3, 5, 2], 3)[1], []),
        "split_uneven": (lambda x: torch.cat(x.split(5, 2)[::-1], 2), []),
        "chunk": (lambda x: torch.cat(x.chunk(3, 3)[1:], 3), []),
        "getitem_twice": (lambda x: operator.add(*[x.chunk(2, 1)[0]] * 2), []),
        "slice": (lambda x: x[:, 1:-1, ::2, -4:], []),
        "slice_beyond": (lambda x: x[:, :, -100:100, 2:5], []),
        "slice_whole": (lambda x: x[:] + 1, []),
        "select": (lambda x: x[:, -1] * x[:, 0], []),
        "select_batch": (lambda x: x[0], []),
        "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0, 2])), []),
        "index": (lambda x: x[:, :, torch.tensor([3, -1])], []),
        "embedding": (lambda x, e: e((x[:, 0, 0].abs() * 2).long().clamp(max=4)), [nn.Embedding(5, 3)]),
        "gather": (lambda x: x.gather(3, x.argmax(3, keepdim=True)), []),
        "triangles": (lambda x: x.triu(1) - x.tril(-1), []),
        "unbind": (lambda x: torch.unbind(x, 1)[2] - x.unbind(1)[0], []),
    },
    "shapes": {
        "unsqueeze_squeeze": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1).squeeze(1), []),
        "squeeze_dims": (lambda x: x.mean((2, 3), keepdim=True).squeeze((2, 3)), []),
        "reshape": (lambda x: x.reshape(x.shape[0], 2, -1) + x.view(-1, 2, 240), []),
        "reshape_batch_in": (lambda x: x.view(x.shape[0] * 4, 12, 10), []),
        "reshape_batch_twice": (lambda x: x.view(x.shape[0], 1, -1).expand(-1, x.shape[0], -1).reshape(-1, 2, 240), []),
        "reshape_two_batches": (lambda x: (x.flatten(1) @ x.flatten(1).t()).reshape(x.shape[0], 1, x.shape[0]), []),
        "flatten": (lambda x: x.flatten(1, 2).flatten(0, 1), []),
        "unflatten": (lambda x: x.unflatten(1, (2, 2)), []),
        "permute": (lambda x: x.permute(0, 2, -1, 1).transpose(1, -1), []),
        "transpose_matrix": (lambda x: x[:, :, 0, 0].t(), []),
        "expand": (lambda x: x[:, :1].expand(-1, 3, -1, -1) + x[0, :1].expand(x.shape[0], 3, 12, 10), []),
        "expand_as": (lambda x: x.mean(1, keepdim=True).expand_as(x) / 2, []),
        "repeat": (lambda x: x.repeat(1, 2, 1, 3) + x.repeat(2, 1, 1, 1, 1)[0].repeat(1, 2, 1, 3), []),
        "repeat_batch": (lambda x: x[:1, :1].repeat(x.shape[0], 2, 1, 1), []),
        "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), []),
        "pad": (lambda x: F.pad(x, (1, 2, 3, 0, 1, 1), value=0.5), []),
        "pad_crop": (lambda x: F.pad(x, (-1, 2, 3, -4)), []),
        "pad_reflect_replicate": (
            lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect") - F.pad(x, (1, 2, 3, 0), "replicate"),
            [],
        ),
        "constant_pad_nd": (lambda x: aten.constant_pad_nd.default(x, [1, 2], 3.0), []),
    },
    "pooling": {
        "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), []),
        "max_pool_dilated": (lambda x: F.max_pool2d(x, (3, 2), 1, 1, dilation=2), []),
        "max_pool_ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), []),
        "max_pool_ceil_dropped": (lambda x: F.max_pool2d(x, 2, 4, 1, ceil_mode=True), []),
        "max_pool_1d": (lambda x: F.max_pool1d(x.flatten(2), 3), []),
        "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), []),
        "avg_pool_uncounted": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), []),
        "avg_pool_ceil": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), []),
        "avg_pool_ceil_unpadded": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), []),
        "avg_pool_ceil_uncounted": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), []),
        "avg_pool_divisor": (lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5), []),
        "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, 1), []),
        "adaptive_avg_pool_divides": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), []),
        "adaptive_avg_pool_same": (lambda x: F.adaptive_avg_pool2d(x, (None, 10)) + 1, []),
        "adaptive_avg_pool_uneven": (lambda x: F.adaptive_avg_pool2d(x, 7), []),
        "adaptive_avg_pool_1d": (lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7), []),
        "adaptive_max_pool": (
            lambda x: F.adaptive_max_pool2d(x, 1) + F.adaptive_max_pool2d(x, (4, 5)).amax((2, 3), True),
            [],
        ),
    },
    "reductions": {
        "mean": (lambda x: x.mean((2, 3)), []),
        "mean_keepdim": (lambda x: x.mean((-1, -2), keepdim=True), []),
        "mean_tokens": (lambda x: x.flatten(2).transpose(1, 2).mean(1), []),
        "mean_all": (lambda x: x.mean() + x.sum() + x.max() - x.min(), []),
        "sum": (lambda x: x.sum((1, 3)) + x.sum(3, keepdim=True).squeeze(3).sum(1, True), []),
        "amax": (lambda x: x.amax((2, 3)) - x.amin((2, 3)), []),
        "max_dim": (lambda x: x.max(1), []),
        "argmax": (lambda x: (x.argmax(1), x.argmin(2, keepdim=True)), []),
        "topk": (lambda x: x.topk(3, 1), []),
        "prod_logsumexp": (lambda x: x.prod(1) + x.logsumexp((1,)), []),
        "var_std": (lambda x: x.var((2, 3), keepdim=True) + x.std(1, keepdim=True, correction=0), []),
        "var_mean": (lambda x: torch.var_mean(x, (1,), correction=2), []),
        "norms": (
            lambda x: F.normalize(x, dim=1) + x.norm(p=1, dim=2, keepdim=True) + x.norm(p=float("inf"), dim=1, keepdim=True),
            [],
        ),
        "cumsum": (lambda x: x.cumsum(-2), []),
        "nearest": (lambda x: F.interpolate(x, scale_factor=2), []),
        "nearest_size": (lambda x: F.interpolate(x, size=(17, 5)), []),
        "nearest_default": (lambda x: aten.upsample_nearest2d.default(x, [24, 30], 2.0, 3.0), []),
        "bilinear": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), []),
        "bilinear_size": (lambda x: F.interpolate(x, size=(7, 23), mode="bilinear"), []),
        "bilinear_corners": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), []),
        "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), []),
        "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), []),
        "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), []),
        "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), []),
    },
    "others": {
        "roll": (lambda x: x.roll((-3, 4), (2, 3)), []),
        "flip": (lambda x: x.flip((1, 3)), []),
        "identities": (lambda x: F.dropout(x.clone().contiguous(), 0.5, False).to(torch.float32) + 1, []),
        "casts": (lambda x: (5 * x).to(torch.int32).float() + (x > 0).to(x.dtype), []),
        "fills": (
            lambda x: x + x.new_zeros(x.shape[0], 1, 1, 10) + torch.full((x.shape[0], 4, 1, 1), 2.0) + torch.ones_like(x),
            [],
        ),
        "scalars": (lambda x: x * torch.tensor(2.5) + x.shape[2] / 3, []),
        "batch_size_as_number": (lambda x: x / x.shape[0] + x.sum(0, keepdim=True) / (x.shape[0] * 2 - 1 // 2), []),
        "ranges": (lambda x: x * torch.arange(10) + torch.ones(12, 10).triu(1), []),
        "returns_input_and_weight": (lambda x, c: (x, c.weight, c(x), c(x)), [nn.Conv2d(4, 4, 1)]),
    },
}
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "flat_roll": (lambda x: x.roll(3), "without a dimension for each shift"),
    "cubic_norm": (lambda x: x.norm(p=3, dim=1), r"norm of order 3 \(known: 1, 2, inf\)"),
    "circular": (lambda x: aten.pad.default(x, [1, 1, 1, 1], "circular"), "padding mode 'circular' at opset 17"),
    "max_pool_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], "only its first 1 results are known"),
    "adaptive_max_pool_uneven": (lambda x: F.adaptive_max_pool2d(x, 7), "does not divide"),
    "two_indices": (lambda x: x[:, torch.tensor([0, 1]), torch.tensor([1, 2])], "2 index tensors"),
}
CASES = {name: group for group, cases in GROUPS.items() for name in cases}


class Group(nn.Module):
    """Every case of a group on the same images, each with outputs of its own."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleDict({f"case_{name}": Apply(function, *layers) for name, (function, layers) in cases.items()})

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {name: case(x) for name, case in self.cases.items()}


@functools.cache
def captured_group(group: str) -> tuple[fx.GraphModule, dict[str, slice]]:
    """The graph of a group (of what is refused for ""), and which of its outputs are whose."""
    cases = GROUPS[group] if group else {name: (function, []) for name, (function, _) in REFUSED.items()}
    module = fill(Group(cases))
    graph = captured(module, SHAPE)
    with torch.no_grad():
        counts = [len(value) if isinstance(value, tuple | list) else 1 for value in module(images(2, SHAPE)).values()]
    ends = np.cumsum(counts).tolist()
    return graph, {name: slice(end - n, end) for name, end, n in zip(cases, ends, counts, strict=True)}


def case(name: str) -> fx.GraphModule:
    """The part of its group's graph that computes one case."""
    graph, outputs = captured_group(CASES.get(name, ""))
    wanted = list(output_nodes(graph.graph)[outputs[name]])
    needed = needed_by([input_node(graph.graph), *wanted])
    part, copied = fx.Graph(), {}
    for node in graph.graph.nodes:
        if node in needed:
            copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(tuple(copied[node] for node in wanted))
    return fx.GraphModule(graph, part)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("name", CASES)
def test_operator_agrees_with_torch(name: str, opset: int) -> None:
    if opset == 13 and name == "triangles":
        with pytest.raises(UnsupportedOperator, match="opset 13 has no Trilu; 14 has"):
            assert_same(case(name), SHAPE, opset=opset)
    else:
        assert_same(case(name), SHAPE, opset=opset)


class Attention(nn.Module):
    """A transformer block on tokens (N, T, D), as vision transformers write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.zeros(1, 17, 16))
        self.block = Attention(16, 2)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class Windows(nn.Module):
    """Shifted-window attention: windows go into the batch dimension, with a table of position biases and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 16, 2, 2), Attention(16, 2)
        self.table = nn.Parameter(torch.zeros(9, 16))
        self.register_buffer("index", torch.arange(16) % 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        n, h, w, d = x.shape
        x = torch.roll(x, (-2, -2), (1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, d).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, d)
        x = self.block(x + self.table[self.index.view(-1)])
        x = x.view(n, h // 4, w // 4, 4, 4, d).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, d)
        return torch.roll(x, (2, 2), (1, 2)).mean((1, 2))


class OptionA(nn.Module):
    """A residual block whose shortcut skips pixels and adds channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.second(self.first(x)) + shortcut)
        return self.head(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class SqueezeExcite(nn.Module):
    """An inverted residual with a gate a channel, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 5, 2, 2, groups=16, bias=False), nn.BatchNorm2d(16))
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)), inplace=True)))
        return self.head(self.project(x * gate))


class Detector(nn.Module):
    """Concatenations, SiLU, pooling pyramid, upsampling, and several outputs of several scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.mix, self.head = nn.Conv2d(24, 8, 1), nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.silu(self.stem(x))
        deep = F.silu(self.deep(x))
        deep = self.mix(torch.cat([deep, F.max_pool2d(deep, 3, 1, 1), F.max_pool2d(deep, 5, 1, 2)], 1))
        wide = self.head(torch.cat([x, F.interpolate(deep, scale_factor=2)], 1))
        return [wide.flatten(2).permute(0, 2, 1), deep.sigmoid()]


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("network", [VisionTransformer, Windows, OptionA, SqueezeExcite, Detector])
def test_network_agrees_with_torch(network: type[nn.Module], opset: int) -> None:
    assert_same(_network(network), (3, 16, 16), opset=opset)


@functools.cache
def _network(network: type[nn.Module]) -> fx.GraphModule:
    return captured(fill(network()), (3, 16, 16))


@pytest.mark.parametrize("file", ["cifar10/resnet20.pt2", "imagenet/mobilenetv1_025.pt2"])
def test_real_network_agrees_with_torch(data_dir: Path, file: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own unpickling
        program = torch.export.load(data_dir / file)
    shape = next(exported_value(node).shape for node in program.graph.nodes if node.name == "x")
    model = assert_same(flatten(program), (shape[1], shape[2], shape[3]))
    assert set(op_types(model)) <= {
        *("Conv", "BatchNormalization", "Relu", "LeakyRelu", "Add", "Slice", "Identity", "Pad"),
        *("GlobalAveragePool", "Squeeze", "Gemm"),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", ["Reshape", "Gemm"]),
        ("linear_4d", ["MatMul", "Add"]),
        ("linear_4d_no_bias", ["MatMul"]),
        ("conv_same", ["Conv"]),
        ("batch_norm", ["BatchNormalization"]),
        ("relu6", ["Mul", "Clip"]),
        ("silu", ["Sigmoid", "Mul"]),
        ("mean", ["GlobalAveragePool", "Squeeze"]),
        ("mean_keepdim", ["GlobalAveragePool"]),
        ("mean_tokens", ["Reshape", "Transpose", "ReduceMean"]),
        ("adaptive_avg_pool", ["GlobalAveragePool"]),
        ("adaptive_avg_pool_divides", ["AveragePool"]),
        ("layer_norm", ["LayerNormalization"]),
        ("max_pool_ceil", ["MaxPool"]),
        ("reshape_batch_in", ["Reshape"]),
        ("ranges", ["Mul", "Add"]),
    ],
)
def test_forms_are_those_that_runtimes_recognise(name: str, expected: list[str]) -> None:
    model = emit(case(name), input_shape=SHAPE, batch=None)
    assert op_types(model) == expected


def test_mean_of_quantized_pixels_runs_in_integers(tmp_path: Path) -> None:
    """ONNX Runtime has to see its integer pooling between Q/DQ at the input and at the result, Squeeze included."""
    model = emit(case("mean"), input_shape=SHAPE, batch=None)
    pooling, squeeze = model.graph.node
    for name, value in (("scale", np.float32(0.02)), ("zero", np.uint8(128))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    squeeze.output[0], pooling.input[0] = "mean", "images"
    quantized = [*_quantize("input", "images"), pooling, squeeze, *_quantize("mean", "output")]
    del model.graph.value_info[:]
    model.graph.ClearField("node")
    model.graph.node.extend(quantized)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "QLinearGlobalAveragePool" in op_types(onnx.load(options.optimized_model_filepath))


def _quantize(source: str, result: str) -> list[onnx.NodeProto]:
    make = onnx.helper.make_node
    return [
        make("QuantizeLinear", [source, "scale", "zero"], [f"{source}_q"]),
        make("DequantizeLinear", [f"{source}_q", "scale", "zero"], [result]),
    ]


def test_gemm_keeps_the_weight_and_matmul_transposes_it() -> None:
    graph, weight = _single("linear", "case_linear")
    stored = initializer(emit(graph, input_shape=SHAPE, batch=None), notes(weight).origin)
    assert stored.shape == (7, 480)
    assert not notes(weight).transposed
    graph, weight = _single("linear_4d", "case_linear_4d")
    stored = initializer(emit(graph, input_shape=SHAPE, batch=None), notes(weight).origin)
    np.testing.assert_array_equal(stored, tensor_of(graph, weight).t().numpy())
    assert notes(weight).transposed is True


def test_weight_of_two_forms_is_stored_once() -> None:
    graph, weight = _single("linear_shared_by_ranks", "case_linear_shared_by_ranks")
    model = emit(graph, input_shape=SHAPE, batch=None)
    assert initializer(model, notes(weight).origin).shape == (7, 10)
    assert not notes(weight).transposed
    assert op_types(model).count("Transpose") == 1


def _single(name: str, prefix: str) -> tuple[fx.GraphModule, fx.Node]:
    """A case and the node of its layer's weight."""
    graph = case(name)
    return graph, next(node for node in graph.graph.nodes if node.op == "get_attr" and str(node.target).endswith("weight"))


def test_names_come_from_origins_and_survive_a_second_time() -> None:
    graph = case("silu")
    image = input_node(graph.graph)
    set_notes(image, replace(notes(image), origin="data"))
    set_notes(output_nodes(graph.graph)[0], replace(notes(output_nodes(graph.graph)[0]), origin="scores"))
    for _ in range(2):
        model = emit(graph, input_shape=SHAPE, batch=None)
        assert [value.name for value in model.graph.input] == ["data"]
        assert [value.name for value in model.graph.output] == ["scores"]
    assert [node.name for node in model.graph.node][-1] == output_nodes(graph.graph)[0].name


def test_origins_that_are_taken_give_way() -> None:
    graph = case("conv")
    for node in graph.graph.nodes:
        set_notes(node, replace(notes(node), origin="same"))
    model = assert_same(graph, SHAPE)
    assert model.graph.output[0].name == "same"


def test_dotted_targets_are_kept() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 2, 1)))
    convolution = next(node for node in graph.graph.nodes if node.op == "call_module")
    with graph.graph.inserting_before(convolution):
        weight, bias = graph.graph.get_attr("0.weight"), graph.graph.get_attr("0.bias")
        call = graph.graph.call_function(aten.conv2d.default, (convolution.args[0], weight, bias))
    convolution.replace_all_uses_with(call)
    graph.graph.erase_node(convolution)
    graph.recompile()
    model = emit(graph, input_shape=SHAPE, batch=None)
    assert [tensor.name for tensor in model.graph.initializer] == ["0.weight", "0.bias"]
    assert (notes(weight).origin, notes(bias).origin) == ("0.weight", "0.bias")


def test_shapes_and_opset_are_written() -> None:
    graph = case("conv")
    for batch, first in ((None, "N"), (2, 2)):
        for opset, version in ((13, 7), (17, 8), (21, 10), (22, 10)):
            model = emit(graph, input_shape=SHAPE, batch=batch, opset=opset, name="dream")
            assert (model.opset_import[0].version, model.ir_version, model.graph.name) == (opset, version, "dream")
            for value, shape in ((model.graph.input[0], (4, 12, 10)), (model.graph.output[0], (6, 6, 5))):
                dims = value.type.tensor_type.shape.dim
                assert (dims[0].dim_param or dims[0].dim_value, *(dim.dim_value for dim in dims[1:])) == (first, *shape)


def test_one_batch_size_makes_every_shape_a_number() -> None:
    model = assert_same(case("reshape_two_batches"), SHAPE, batch=2)
    assert "Shape" not in op_types(model)
    assert "Shape" in op_types(emit(case("reshape_two_batches"), input_shape=SHAPE, batch=None))


def test_stored_tensors_without_a_form_become_constants() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.erfinv().sinh())

    graph = captured(fill(Standardised()), SHAPE)
    model = assert_same(graph, SHAPE)
    assert op_types(model) == ["Conv"]
    assert len(model.graph.initializer) == 1
    assert all(notes(node).origin is None for node in graph.graph.nodes if node.op == "get_attr")


def test_unknown_operators_are_named_all_at_once() -> None:
    def unknown(x: Tensor) -> Tensor:
        return torch.lgamma(torch.lgamma(x.relu())) + torch.fft.fft(x).real.digamma() + x.cummax(1).values

    graph = captured(Apply(unknown), SHAPE)
    set_notes(input_node(graph.graph), replace(notes(input_node(graph.graph)), origin="data"))
    with pytest.raises(UnsupportedOperator) as caught:
        emit(graph, input_shape=SHAPE, batch=None)
    message = str(caught.value)
    assert "\n" not in message
    assert "aten.lgamma.default (node lgamma and 1 more)" in message
    for name in ("fft", "digamma", "cummax"):
        assert name in message
    assert notes(input_node(graph.graph)).origin == "data"


@pytest.mark.parametrize(("name", "reason"), [(name, reason) for name, (_, reason) in REFUSED.items()])
def test_uses_without_a_form_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedOperator, match=reason):
        emit(case(name), input_shape=SHAPE, batch=None)


def test_training_mode_is_refused() -> None:
    graph = case("batch_norm")
    node = next(node for node in graph.graph.nodes if node.target is aten.batch_norm.default)
    node.args = (*node.args[:5], True, *node.args[6:])
    graph.recompile()
    with pytest.raises(UnsupportedOperator, match="training mode"):
        emit(graph, input_shape=SHAPE, batch=None)


@pytest.mark.parametrize("opset", [12, 23])
def test_opsets_outside_are_refused(opset: int) -> None:
    with pytest.raises(OptionError, match=f"opset {opset} cannot be written \\(known: 13 to 22\\)"):
        emit(case("relu"), input_shape=SHAPE, batch=None, opset=opset)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot run 2 images of shape \(3, 8, 8\)"):
        emit(case("conv"), input_shape=(3, 8, 8), batch=None)
