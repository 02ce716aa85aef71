"""Einstein sums as products of matrices, which can be quantized."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

TWO_FACTORS = re.compile(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


def einsum(equation: str, tensors: Sequence[Tensor], path: Sequence[int] | None = None) -> Tensor:
    """`torch.einsum`: two factors that share an axis are permuted and multiplied once, what else there is becomes what torch
    makes of it."""
    found = TWO_FACTORS.fullmatch(equation.replace(" ", ""))
    if found is not None and _is_product(*found.groups()):
        return _product(tensors[0], tensors[1], *found.groups())
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    product: Tensor = torch.ops.aten.einsum.default._op_dk(composite, equation, tensors, path=path)
    return product


def _is_product(one: str, two: str, result: str) -> bool:
    """Whether every axis is shared, or kept from one side; each side keeps one of its own and they are summed over another."""
    alone, summed = set(one) ^ set(two), (set(one) & set(two)) - set(result)
    unique = all(len(set(axes)) == len(axes) for axes in (one, two, result))
    return unique and bool(summed) and alone <= set(result) and bool(alone & set(one)) and bool(alone & set(two))


def _product(left: Tensor, right: Tensor, one: str, two: str, result: str) -> Tensor:
    if len(one) < len(two) and not set(one) & set(two) & set(result):
        left, right, one, two = right, left, two, one  # a matrix stands to the right, as a layer's weight does
    batch, summed = ([axis for axis in one if axis in two and (axis in result) is kept] for kept in (True, False))
    rows, columns = [axis for axis in one if axis not in two], [axis for axis in two if axis not in one]
    sizes = dict(zip(one + two, (*left.shape, *right.shape), strict=True))
    x = left.permute([one.index(axis) for axis in (*batch, *rows, *summed)])
    y = right.permute([two.index(axis) for axis in (*batch, *summed, *columns)])
    if len(summed) > 1:
        x, y = x.flatten(-len(summed)), y.flatten(len(batch), len(batch) + len(summed) - 1)
    if len(columns) > 1:
        y = y.flatten(-len(columns))
    if batch and len(rows) > 1:
        x = x.flatten(len(batch), -2)
    order = [*batch, *rows, *columns]
    product = torch.matmul(x, y).reshape([sizes[axis] for axis in order])
    return product.permute([order.index(axis) for axis in result])
