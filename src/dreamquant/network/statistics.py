"""BatchNorm statistics: what a trained network remembers of its training data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from dreamquant.network.answers import class_logits
from dreamquant.network.graph import Network, aten, input_node, output_nodes, tensor_of, whole_batches
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import CONVOLUTIONS, LINEARS, TRANSPOSED, WEIGHTED, argument, is_call
from dreamquant.network.outputs import class_output, main_output

EPSILON = 1e-6  # added to variances before the root, as in the official code of ZeroQ, DSG and Genie


@dataclass(frozen=True)
class BatchNormStatistics:
    """Running mean and standard deviation (C,) of the tensor that enters one BatchNorm."""

    name: str
    mean: Tensor
    std: Tensor


def batch_norms(network: Network) -> list[BatchNormStatistics]:
    """The statistics of every BatchNorm of the network, in order; empty where they were folded or never were."""
    return [
        BatchNormStatistics(
            node.name,
            tensor_of(network.graph, argument(node, 3)),
            (tensor_of(network.graph, argument(node, 4)) + EPSILON).sqrt(),
        )
        for node in _batch_norm_nodes(network.graph.graph)
    ]


class Probed(NamedTuple):
    """What a network shows on a batch: scores as `watch` has them, what enters each BatchNorm, and what its last layer."""

    scores: Tensor
    features: list[Tensor]
    embedding: Tensor  # (N, D), averaged over positions


def probe(
    network: Network, *, before_stride: Callable[[Tensor], Tensor] | None = None, features: bool = True
) -> Callable[[Tensor], Probed]:
    """A function of images that returns what the network shows on them.

    `before_stride` is applied to what enters each convolution with a stride above 1 (Genie's swing convolution). Without
    `features` there are none.
    """
    graph = network.graph.graph
    last = next((node for node in reversed(graph.nodes) if is_call(node, WEIGHTED)), None)
    embedded = input_node(graph) if last is None else argument(last, 0)
    entering = [argument(node, 0) for node in _batch_norm_nodes(graph) if features]
    run = watch(network, [*entering, embedded], before_stride=before_stride)

    def show(images: Tensor) -> Probed:
        scores, (*features, embedding) = run(images)
        channels_last = is_call(last, LINEARS)
        embedding = embedding.reshape(len(images), -1, embedding.shape[-1]) if channels_last else embedding.flatten(2)
        return Probed(scores, features, embedding.mean(1 if channels_last else 2))

    return show


def piecewise(show: Callable[[Tensor], Probed], size: int) -> Callable[[Tensor], Probed]:
    """A function of images that returns the same scores and embeddings, `size` images at a time: what lies between is not kept
    for the gradient but computed a second time. Features, which are of all images, are left out."""

    def shown(images: Tensor) -> Probed:
        if len(images) <= size:
            return show(images)
        found = [checkpoint(show, piece, use_reentrant=False, preserve_rng_state=False) for piece in torch.split(images, size)]
        return Probed(torch.cat([one.scores for one in found]), [], torch.cat([one.embedding for one in found]))

    return shown


def watch(
    network: Network, nodes: list[fx.Node], *, before_stride: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """A function of images that returns (scores, [the value of each node, ...]); gradients reach the images.

    Scores are logits (N, classes), at least two, of the first output of classes; of a network that has none, its main output
    (N, ...). Values may hold several rows an image along their first axis, as windows do. BatchNorms are computed as the products
    and sums that they are in eval mode. The network itself is left as it is.
    """
    graph = copy.deepcopy(network.graph)
    inside = list(graph.graph.nodes)
    copied = {node.name: node for node in inside}
    place, classes = main_output(network.outputs), class_output(network.outputs)
    shown = network.outputs[place] if network.outputs else None
    inside[-1].args = ((output_nodes(graph.graph)[place], [copied[node.name] for node in nodes]),)
    for node in _batch_norm_nodes(graph.graph):
        _replace_by_affine(graph, node)
    for node in inside:
        if before_stride is not None and is_call(node, CONVOLUTIONS - TRANSPOSED) and max(_strides(node)) > 1:
            with graph.graph.inserting_before(node):
                node.args = (graph.graph.call_function(before_stride, (node.args[0],)), *node.args[1:])
    graph.graph.eliminate_dead_code()
    graph.recompile()

    def one(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        scores, values = graph(images)
        if shown is not None:
            scores = shown.by_image(scores, len(images))
        return scores if classes is None or shown is None else class_logits(shown, scores), values

    def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if network.batch is None:
            return one(images)
        padded = whole_batches(images, network.batch)
        scores, features = zip(*(one(piece) for piece in torch.split(padded, network.batch)), strict=True)
        joined = [torch.cat(parts) for parts in zip(*features, strict=True)]
        wanted = [value[: len(value) // len(padded) * len(images)] for value in joined]
        return torch.cat(scores)[: len(images)], wanted

    return run


def _strides(node: fx.Node) -> Sequence[int]:
    stride = node.args[3] if len(node.args) > 3 else 1
    return stride if isinstance(stride, list | tuple) else [stride]  # type: ignore[list-item]


def _replace_by_affine(graph: fx.GraphModule, node: fx.Node) -> None:
    """BatchNorm in eval mode as shift + scale * x: fewer passes of memory, and a cheaper gradient."""
    weight, bias, mean, variance = (
        None if argument is None else tensor_of(graph, argument)  # type: ignore[arg-type]
        for argument in node.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    epsilon: float = node.args[7]  # type: ignore[assignment]
    scale = (variance + epsilon).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    shape = (-1, *[1] * (len(shape_of(node)) - 2))
    with graph.graph.inserting_before(node):
        parts = []
        for part, tensor in (("shift", shift), ("scale", scale)):
            graph.register_buffer(f"{node.name}_{part}", tensor.reshape(shape))
            parts.append(graph.graph.get_attr(f"{node.name}_{part}"))
        affine = graph.graph.call_function(aten.addcmul.default, (parts[0], node.args[0], parts[1]))
    node.replace_all_uses_with(affine)


def moments(features: Tensor, *, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of (N, C, ...): (N, C) for each sample, or (C,) over the batch.

    In single precision from the means of x and x^2, so exact to about 1e-7 of mean^2 + variance; several times faster, with its
    gradient, than `torch.var_mean`.
    """
    flat = features.float().reshape(*features.shape[:2], -1)
    mean, variance = _Moments.apply(flat, per_sample)  # type: ignore[no-untyped-call]
    return (mean, (variance + EPSILON).sqrt()) if per_sample else (mean[0], (variance[0] + EPSILON).sqrt())


class _Moments(torch.autograd.Function):
    """(N, C, P) -> mean and biased variance, (N, C) for each sample or (1, C); the gradient is one fused pass."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
        mean = features.mean(2)
        power = torch.linalg.vector_norm(features, 2, 2).square() / features.shape[2]
        ctx.count = features.shape[2]
        if not per_sample:
            mean, power = mean.mean(0, keepdim=True), power.mean(0, keepdim=True)
            ctx.count *= len(features)
        ctx.save_for_backward(features, mean)
        return mean, (power - mean.square()).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> tuple[Tensor, None]:
        features, mean = ctx.saved_tensors
        slope = variance_gradient * (2 / ctx.count)
        offset = mean_gradient / ctx.count - slope * mean
        return torch.addcmul(offset.unsqueeze(2), features, slope.unsqueeze(2)), None


def _batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is aten.batch_norm.default]
