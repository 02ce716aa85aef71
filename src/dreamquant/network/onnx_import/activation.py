"""Activation functions, softmax and dropout."""

from __future__ import annotations

import math

import torch
from torch import fx

from dreamquant.network.onnx_import.builder import Known, Op, operator

aten = torch.ops.aten


@operator("LeakyRelu")
def leaky_relu(op: Op) -> fx.Node:
    return op.call(aten.leaky_relu.default, op.tensor(0), op.attribute("alpha", 0.01))


@operator("PRelu")
def prelu(op: Op) -> fx.Node:
    images, slope, shape = op.tensor(0), op.tensor(1), op.shape(1)
    channels = op.shape(0)[1] if op.rank() > 1 else 1
    if math.prod(shape) == 1 or (shape == (channels,) + (1,) * (op.rank() - 2)):
        if len(shape) != 1:
            slope = op.call(aten.reshape.default, slope, [-1])
        return op.call(aten.prelu.default, images, slope)
    positive = op.call(aten.ge.Scalar, images, 0)
    return op.call(aten.where.self, positive, images, op.call(aten.mul.Tensor, images, slope))


@operator("Elu")
def elu(op: Op) -> fx.Node:
    return op.call(aten.elu.default, op.tensor(0), op.attribute("alpha", 1.0))


@operator("Selu")
def selu(op: Op) -> fx.Node:
    alpha, gamma = op.attribute("alpha", 1.67326319217681884765625), op.attribute("gamma", 1.05070102214813232421875)
    return op.call(aten.elu.default, op.tensor(0), alpha, gamma)


@operator("Celu")
def celu(op: Op) -> fx.Node:
    return op.call(aten.celu.default, op.tensor(0), op.attribute("alpha", 1.0))


@operator("ThresholdedRelu")
def thresholded_relu(op: Op) -> fx.Node:
    return op.call(aten.threshold.default, op.tensor(0), op.attribute("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def hard_sigmoid(op: Op) -> fx.Node:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return op.call(aten.hardsigmoid.default, op.tensor(0))
    line = op.call(aten.add.Tensor, op.call(aten.mul.Tensor, op.tensor(0), alpha), beta)
    return op.call(aten.hardtanh.default, line, 0.0, 1.0)


@operator("Softsign")
def softsign(op: Op) -> fx.Node:
    size = op.call(aten.add.Tensor, op.call(aten.abs.default, op.tensor(0)), 1.0)
    return op.call(aten.div.Tensor, op.tensor(0), size)


@operator("Gelu")
def gelu(op: Op) -> fx.Node:
    return op.call(aten.gelu.default, op.tensor(0), approximate=op.attribute("approximate", "none"))


@operator("Swish")
def swish(op: Op) -> fx.Node:
    alpha = op.attribute("alpha", 1.0)
    if alpha == 1:
        return op.call(aten.silu.default, op.tensor(0))
    gate = op.call(aten.sigmoid.default, op.call(aten.mul.Tensor, op.tensor(0), alpha))
    return op.call(aten.mul.Tensor, op.tensor(0), gate)


@operator("Clip")
def clip(op: Op) -> fx.Node | Known:
    if not (op.has(1) or op.has(2)):
        return op.value(0)
    if any(op.has(index) and not op.is_known(index) for index in (1, 2)):
        return op.call(aten.clamp.Tensor, op.tensor(0), op.optional(1), op.optional(2))
    low, high = (op.scalar(index) if op.has(index) else None for index in (1, 2))
    if (low, high) == (0, 6):
        return op.call(aten.hardtanh.default, op.tensor(0), 0.0, 6.0)
    return op.call(aten.clamp.default, op.tensor(0), low, high)


@operator("Softmax", "LogSoftmax")
def softmax(op: Op) -> fx.Node:
    target = aten.softmax.int if op.node.op_type == "Softmax" else aten.log_softmax.int
    axis = op.axis(-1 if op.opset >= 13 else 1)
    rest = op.shape(0)[axis:]
    if op.opset >= 13 or math.prod(rest) == rest[0]:
        return op.call(target, op.tensor(0), axis)
    if math.prod(rest) == rest[-1]:
        return op.call(target, op.tensor(0), -1)
    rows = op.call(target, op.call(aten.flatten.using_ints, op.tensor(0), axis), -1)  # before opset 13: over all of `rest`
    return op.call(aten.unflatten.int, rows, axis, list(rest))


@operator("Identity")
def identity(op: Op) -> fx.Node | Known:
    return op.value(0)


@operator("Dropout")
def dropout(op: Op) -> fx.Node | Known:
    op.only_first_output()
    if op.has(2) and bool(op.known(2)):
        op.refuse("input training_mode is true; export the network in evaluation mode")
    return op.value(0)
