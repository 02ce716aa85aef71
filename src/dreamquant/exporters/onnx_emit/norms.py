"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dreamquant.exporters.onnx_emit.builder import Builder, Value, emits, refuse
from dreamquant.exporters.onnx_emit.reductions import reduced
from dreamquant.network.graph import aten


@emits(aten.batch_norm.default)
def batch_norm(
    g: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    training: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> str:
    if training or mean is None or var is None:
        refuse("it takes the statistics of the batch (training mode, or no running statistics)")
    channels = x.size(1)
    scale = weight or g.const(torch.ones(channels), x.dtype, "scale")
    shift = bias or g.const(torch.zeros(channels), x.dtype, "shift")
    return g.op("BatchNormalization", x, scale, shift, mean, var, epsilon=float(eps))


@emits(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm(
    g: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> list[str | None]:
    return [batch_norm(g, x, weight, bias, mean, var, False, momentum, eps), None, None]


@emits(aten.instance_norm.default)
def instance_norm(
    g: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> str:
    if not use_input_stats:
        return batch_norm(g, x, weight, bias, mean, var, False, momentum, eps)
    channels = x.size(1)
    scale = weight or g.const(torch.ones(channels), x.dtype, "scale")
    shift = bias or g.const(torch.zeros(channels), x.dtype, "shift")
    return g.op("InstanceNormalization", x, scale, shift, epsilon=float(eps))


@emits(aten.group_norm.default)
def group_norm(
    g: Builder,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> str:
    """An instance normalisation over the elements of each group, then scale and shift a channel."""
    ones, zeros = g.const(torch.ones(groups), x.dtype, "scale"), g.const(torch.zeros(groups), x.dtype, "shift")
    grouped = g.op("Reshape", x, g.ints([0, groups, -1], "groups"))
    normal = g.op("InstanceNormalization", grouped, ones, zeros, epsilon=float(eps))
    result = g.op("Reshape", normal, g.shape_of(x.shape, x))
    wide = (-1, *[1] * (x.rank - 2))
    if weight is not None:
        result = g.op("Mul", result, g.reshape(weight, wide))
    return result if bias is None else g.op("Add", result, g.reshape(bias, wide))


@emits(aten.layer_norm.default)
def layer_norm(
    g: Builder,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> str:
    if g.opset >= 17:
        scale = weight or g.const(torch.ones(*shape), x.dtype, "scale")
        return g.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(eps))
    axes = [x.rank - 1 - i for i in reversed(range(len(shape)))]
    centred = g.op("Sub", x, reduced(g, "ReduceMean", x, axes, True))
    variance = reduced(g, "ReduceMean", g.op("Mul", centred, centred), axes, True)
    result = g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, g.const(eps, x.dtype))))
    result = result if weight is None else g.op("Mul", result, weight)
    return result if bias is None else g.op("Add", result, bias)


@emits(aten.native_layer_norm.default)
def native_layer_norm(
    g: Builder, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> list[str | None]:
    return [layer_norm(g, x, shape, weight, bias, eps), None, None]


@emits(aten.rms_norm.default)
def rms_norm(g: Builder, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None) -> str:
    axes = [x.rank - 1 - i for i in reversed(range(len(shape)))]
    power = reduced(g, "ReduceMean", g.op("Mul", x, x), axes, True)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    result = g.op("Div", x, g.op("Sqrt", g.op("Add", power, g.const(floor, x.dtype))))
    return result if weight is None else g.op("Mul", result, weight)
