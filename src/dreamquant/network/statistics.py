"""BatchNorm statistics: what a trained network remembers of its training data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dreamquant.network.graph import Network, aten, output_nodes, tensor_of, whole_batches

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
            tensor_of(network.graph, node.args[3]),  # type: ignore[arg-type]
            (tensor_of(network.graph, node.args[4]) + EPSILON).sqrt(),  # type: ignore[arg-type]
        )
        for node in _batch_norm_nodes(network.graph.graph)
    ]


def probe(network: Network) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """A function of images that returns (first output, [the tensor entering each BatchNorm, ...])."""
    graph = copy.deepcopy(network.graph)
    result = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    entering = [node.args[0] for node in _batch_norm_nodes(graph.graph)]
    result.args = ((output_nodes(graph.graph)[0], entering),)
    graph.recompile()

    def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if network.batch is None:
            return graph(images)  # type: ignore[no-any-return]
        pieces = torch.split(whole_batches(images, network.batch), network.batch)
        scores, features = zip(*(graph(piece) for piece in pieces), strict=True)
        joined = [torch.cat(parts)[: len(images)] for parts in zip(*features, strict=True)]
        return torch.cat(scores)[: len(images)], joined

    return run


def moments(features: Tensor, *, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of (N, C, ...): (N, C) for each sample, or (C,) over the batch."""
    axes = [axis for axis in range(features.dim()) if axis != 1 and not (per_sample and axis == 0)]
    variance, mean = torch.var_mean(features.float(), axes, correction=0)
    return mean, (variance + EPSILON).sqrt()


def _batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is aten.batch_norm.default]
