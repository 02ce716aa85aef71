"""Layers with weights: convolutions, linear layers, products of matrices, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreamquant.exporters.onnx_emit.builder import Builder, Operand, Value, emits, ints_of, refuse
from dreamquant.network.graph import aten


@emits(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(
    g: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str:
    pads = ints_of(padding, weight.rank - 2)
    return _conv(g, "Conv", x, weight, bias, stride, pads + pads, dilation, groups)


@emits(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def conv_padding(
    g: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> str:
    spatial = weight.rank - 2
    reach = [d * (weight.size(2 + i) - 1) for i, d in enumerate(ints_of(dilation, spatial))]
    begin = [r // 2 for r in reach] if padding == "same" else [0] * spatial
    end = [r - b for r, b in zip(reach, begin, strict=True)] if padding == "same" else [0] * spatial
    return _conv(g, "Conv", x, weight, bias, stride, begin + end, dilation, groups)


@emits(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    g: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> str:
    spatial = weight.rank - 2
    pads, extra = ints_of(padding, spatial), ints_of(output_padding, spatial)
    more = {"output_padding": extra} if any(extra) else {}
    return _conv(g, "ConvTranspose", x, weight, bias, stride, pads + pads, dilation, groups, **more)


@emits(aten.convolution.default)
def convolution(
    g: Builder,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> str:
    if transposed:
        return conv_transpose(g, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(g, x, weight, bias, stride, padding, dilation, groups)


def _conv(
    g: Builder,
    op_type: str,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    pads: Sequence[int],
    dilation: Any,
    groups: int,
    **more: Any,
) -> str:
    if x.rank != weight.rank:
        refuse(f"an input of shape {x.shape} without the batch dimension")
    if not isinstance(groups, int):
        refuse("it has as many groups as there are images")
    spatial = weight.rank - 2
    return g.op(
        op_type,
        x,
        weight,
        bias,
        kernel_shape=[weight.size(2 + i) for i in range(spatial)],
        strides=ints_of(stride, spatial),
        pads=list(pads),
        dilations=ints_of(dilation, spatial),
        group=groups,
        **more,
    )


@emits(aten.linear.default)
def linear(g: Builder, x: Value, weight: Value, bias: Value | None = None) -> str:
    """Gemm on the weight as it is, (out, in), for a batch of vectors; else MatMul on (in, out) and Add."""
    if x.rank == 2:
        return g.op("Gemm", x, weight, bias, transB=1)
    ready: Operand = weight if weight.transposed else g.op("Transpose", weight, perm=[1, 0])
    product = g.op("MatMul", x, ready)
    return product if bias is None else g.op("Add", product, bias)


@emits(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(g: Builder, x: Value, other: Value) -> str:
    return g.op("MatMul", x, other)


@emits(aten.addmm.default)
def addmm(g: Builder, bias: Value, x: Value, other: Value, beta: float = 1, alpha: float = 1) -> str:
    return g.op("Gemm", x, other, bias, alpha=float(alpha), beta=float(beta))


@emits(aten.baddbmm.default)
def baddbmm(g: Builder, bias: Value, x: Value, other: Value, beta: float = 1, alpha: float = 1) -> str:
    product = g.op("MatMul", x, other)
    if alpha != 1:
        product = g.op("Mul", product, g.const(alpha, x.dtype))
    addend: Operand = bias if beta == 1 else g.op("Mul", bias, g.const(beta, x.dtype))
    return product if beta == 0 else g.op("Add", product, addend)


@emits(aten.einsum.default)
def einsum(g: Builder, equation: str, tensors: Sequence[Value], _path: Sequence[int] | None = None) -> str:
    return g.op("Einsum", *tensors, equation=equation)


@emits(aten.embedding.default)
def embedding(g: Builder, weight: Value, indices: Value, *_: Any) -> str:
    return g.op("Gather", weight, indices, axis=0)
