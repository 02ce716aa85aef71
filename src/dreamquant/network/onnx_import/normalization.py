"""Batch, instance, group, layer and local response normalization."""

from __future__ import annotations

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Op, operator

aten = torch.ops.aten


@operator("BatchNormalization")
def batch_normalization(op: Op) -> fx.Node:
    op.only_first_output()
    if op.attribute("training_mode", 0):
        op.refuse("attribute training_mode=1: the file normalizes by the batch it sees; export it in evaluation mode")
    images, scale, bias, mean, variance = op.tensors()
    momentum = 1 - op.attribute("momentum", 0.9)
    epsilon = op.attribute("epsilon", 1e-5)
    return op.call(aten.batch_norm.default, images, scale, bias, mean, variance, False, momentum, epsilon, False)


@operator("InstanceNormalization")
def instance_normalization(op: Op) -> fx.Node:
    images, scale, bias = op.tensors()
    epsilon = op.attribute("epsilon", 1e-5)
    return op.call(aten.instance_norm.default, images, scale, bias, None, None, True, 0.1, epsilon, False)


@operator("GroupNormalization")
def group_normalization(op: Op) -> fx.Node:
    images, scale, bias = op.tensors()
    groups, channels = op.attribute("num_groups"), op.shape(0)[1]
    if op.opset < 21 and groups != channels:  # one scale and bias for a whole group
        scale = op.call(aten.repeat_interleave.self_int, scale, channels // groups)
        bias = op.call(aten.repeat_interleave.self_int, bias, channels // groups)
    return op.call(aten.group_norm.default, images, groups, scale, bias, op.attribute("epsilon", 1e-5), False)


@operator("LayerNormalization")
def layer_normalization(op: Op) -> fx.Node:
    op.only_first_output()
    sizes = list(op.shape(0)[op.axis(-1) :])
    epsilon = op.attribute("epsilon", 1e-5)
    return op.call(aten.layer_norm.default, op.tensor(0), sizes, op.tensor(1), op.optional(2), epsilon, False)


@operator("LpNormalization")
def lp_normalization(op: Op) -> fx.Node:
    order, axis = op.attribute("p", 2), op.axis(-1)
    norm = op.call(aten.linalg_vector_norm.default, op.tensor(0), order, [axis], True)
    return op.call(aten.div.Tensor, op.tensor(0), norm)


@operator("LRN")
def local_response_normalization(op: Op) -> fx.Node:
    size, images = op.attribute("size"), op.tensor(0)
    if op.rank() != 4:
        op.refuse(f"its input has {op.rank()} dimensions; only (N, C, H, W) is known")
    squares = op.call(aten.unsqueeze.default, op.call(aten.mul.Tensor, images, images), 1)
    around = op.call(aten.pad.default, squares, [0, 0, 0, 0, (size - 1) // 2, size // 2], "constant", 0.0)
    mean = op.call(aten.squeeze.dims, op.call(aten.avg_pool3d.default, around, [size, 1, 1], [1, 1, 1]), [1])
    scaled = op.call(aten.mul.Tensor, mean, op.attribute("alpha", 1e-4))
    base = op.call(aten.add.Tensor, scaled, op.attribute("bias", 1.0))
    return op.call(aten.div.Tensor, images, op.call(aten.pow.Tensor_Scalar, base, op.attribute("beta", 0.75)))
