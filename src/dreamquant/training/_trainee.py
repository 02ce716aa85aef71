"""A student as a module that can be trained: its stored tensors learn, its grids move with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dreamquant.network.edit import set_tensor
from dreamquant.network.graph import aten, joined, run_batched, tensor_of
from dreamquant.network.notes import notes
from dreamquant.network.operators import WEIGHTED, argument, is_call, unquantized
from dreamquant.quantization.biases import LARGEST_BIAS, rebase_biases
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import Grid, grid_of_range
from dreamquant.quantization.plan import LARGEST_BITS
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.walk import keep_float, quantizer_of
from dreamquant.quantization.weights import is_depthwise, saturation_free_scale

MOMENTUM = 0.9  # of the running ranges (GDFQ)
CHUNK = 64  # images run at once when nothing is learnt

Floor = Callable[[Tensor], Tensor]  # of a weight: the smallest scales that it may have


class Straight(torch.autograd.Function):
    """x on its nearest levels; the gradient is the identity, also for what was cut off (the released code of GDFQ and LRQ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Grid | Codebook) -> Tensor:  # noqa: ARG004
        return levels.fake(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class WeightQuantizer(nn.Module):
    """Puts a weight on the grid of its own smallest and largest value, found anew each time.

    A range that a method has narrowed keeps its share of that range; levels of a codebook stay. `floor` gives the smallest
    scales that the runtime allows.
    """

    def __init__(self, weight: Tensor, levels: Grid | Codebook, floor: Floor | None) -> None:
        super().__init__()
        self.levels, self.floor, self.share = levels, floor, weight.new_ones(())
        if isinstance(levels, Grid):
            self.share = (levels.scale / self._range_grid(weight, levels).scale).clamp(max=1.0)

    def found(self, weight: Tensor) -> Grid | Codebook:
        """The levels for a weight."""
        if not isinstance(self.levels, Grid):
            return self.levels
        with torch.no_grad():
            grid = self._range_grid(weight, self.levels)
            return grid if self.floor is None else replace(grid, scale=torch.maximum(grid.scale, self.floor(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = Straight.apply(weight, self.found(weight))  # type: ignore[no-untyped-call]
        return result

    def _range_grid(self, weight: Tensor, like: Grid) -> Grid:
        rows = weight.reshape(1, -1) if like.axis is None else weight.transpose(0, like.axis).flatten(1)
        low, high = rows.aminmax(dim=1)
        return grid_of_range(low * self.share, high * self.share, bits=like.bits, symmetric=like.qmin < 0, axis=like.axis)


class ActivationQuantizer(nn.Module):
    """Puts an activation on its grid. While `observing`, the grid is that of the running range of what has passed.

    The running range is the exponential mean of the batches' smallest and largest values, divided by 1 - momentum^t, so that the
    first batches count in full. A quantizer that stands at several places takes all that pass in one batch together.
    """

    ends: Tensor  # (2,), float64: running sums of lowest and highest, not yet divided
    steps: Tensor  # (), int64: the batches seen; 0: the grid is as given

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.given, self.grid, self.observing = grid, grid, False
        self.register_buffer("ends", torch.zeros(2, dtype=torch.float64, device=grid.scale.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=grid.scale.device))
        self.batch: tuple[Tensor, Tensor, Tensor] | None = None  # the sums before this batch, its lowest, its highest

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x.detach())
        result: Tensor = Straight.apply(x, self.grid)  # type: ignore[no-untyped-call]
        return result

    def settle(self) -> None:
        """Take the grid that the running range has; where nothing was seen, the given one."""
        self.grid = self.given
        if self.steps:
            low, high = (self.ends / (1 - MOMENTUM ** self.steps.item())).float()
            self.grid = grid_of_range(low, high, bits=self.given.bits, symmetric=self.given.qmin < 0)

    def _observe(self, x: Tensor) -> None:
        low, high = x.aminmax()
        if self.batch is None:
            self.steps += 1
            self.batch = self.ends.clone(), low, high
        else:
            self.batch = self.batch[0], torch.minimum(self.batch[1], low), torch.maximum(self.batch[2], high)
        before, low, high = self.batch
        self.ends.copy_(MOMENTUM * before + (1 - MOMENTUM) * torch.stack([low, high]))
        self.settle()


class BiasQuantizer(nn.Module):
    """Puts a bias on whole multiples of its input's step times its weight's, as they are at that moment.

    A bias too large for 32 bits gets wider steps, as in `rebase_biases`. At four bits such steps are coarse enough to matter.
    """

    def __init__(self, source: ActivationQuantizer, weight: Callable[[], Grid | Codebook]) -> None:
        super().__init__()
        self.source, self.weight = source, weight

    def forward(self, bias: Tensor) -> Tensor:
        levels = self.weight()
        assert isinstance(levels, Grid)
        scale = (self.source.grid.scale * levels.scale).repeat(bias.numel() // levels.scale.numel())
        scale = torch.maximum(scale, bias.detach().abs() / LARGEST_BIAS)
        grid = Grid(scale, torch.zeros_like(scale), -(2**31), 2**31 - 1, 0)
        result: Tensor = Straight.apply(bias, grid)  # type: ignore[no-untyped-call]
        return result


class Trainee(nn.Module):
    """A copy of a student in which weights, biases, and scales and shifts of BatchNorms are parameters.

    BatchNorms stay in eval mode.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.given = student
        self.graph = copy.deepcopy(student.network.graph)
        self.ranges: dict[str, ActivationQuantizer] = {}
        self.weights: dict[str, WeightQuantizer] = {}
        nodes = quantizer_nodes(self.graph.graph)
        for node in sorted(nodes, key=lambda node: notes(node).kind == "bias"):  # a bias needs the others
            self._replace_quantizer(node)
        for name in dict.fromkeys(str(node.target) for node in learnt_nodes(self.graph)):
            value = getattr(self.graph, name)
            delattr(self.graph, name)
            self.graph.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, images: Tensor) -> list[Tensor]:
        """All outputs on images (N, C, H, W), each (N, ...)."""
        for module in self.ranges.values():
            module.batch = None
        network = self.given.network
        return run_batched(self.graph, images, network.batch, network.outputs)

    def answers(self, images: Tensor) -> list[Tensor]:
        """The same in pieces, where nothing is learnt."""
        return joined(self, torch.split(images, CHUNK))

    def observe(self, on: bool) -> None:
        """Let the activations' ranges follow what passes, or hold them."""
        for module in self.ranges.values():
            module.observing = on

    def state(self) -> dict[str, Tensor]:
        """What training changes, copied."""
        found: dict[str, Tensor] = dict(self.graph.named_parameters())
        for name, module in self.ranges.items():
            found |= {f"{name}.{part}": tensor for part, tensor in module.named_buffers()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a `state`."""
        with torch.no_grad():
            for name, parameter in self.graph.named_parameters():
                parameter.copy_(state[name])
        for name, module in self.ranges.items():
            module.load_state_dict({part: state[f"{name}.{part}"] for part, _ in module.named_buffers()})
            module.settle()

    def student(self) -> Student:
        """A student with what was learnt: weights on their levels, ranges as they stand, biases on their integer grid."""
        network = self.given.network
        graph = copy.deepcopy(network.graph)
        nodes = learnt_nodes(graph)
        for node in nodes:
            keep_float(graph, node)
        for node in nodes:
            set_tensor(graph, node, self.graph.get_parameter(str(node.target)).detach().clone())
        for node in quantizer_nodes(graph.graph):
            name, stored = str(node.target), node.all_input_nodes[0]
            if name in self.ranges:
                quantizer_of(graph, node).grid = self.ranges[name].grid
            elif name in self.weights:
                value = tensor_of(graph, stored)
                levels = quantizer_of(graph, node).grid = self.weights[name].found(value)
                if all(user.op == "call_module" for user in stored.users):  # a layer in float reads the others as they are
                    set_tensor(graph, stored, levels.fake(value))
        student = replace(self.given, network=network.with_graph(graph))
        rebase_biases(student)
        return student

    def _replace_quantizer(self, node: fx.Node) -> None:
        name, levels = str(node.target), quantizer_of(self.given.network.graph, node).grid
        if name in self.ranges or name in self.weights:
            return
        if notes(node).kind == "activation" and isinstance(levels, Grid):
            self.ranges[name] = ActivationQuantizer(levels)
            setattr(self.graph, name, self.ranges[name])
        elif notes(node).kind == "weight" and levels is not None:
            layer, stored = next(iter(node.users)), node.all_input_nodes[0]
            self.weights[name] = WeightQuantizer(tensor_of(self.graph, stored), levels, self._floor(layer, levels))
            setattr(self.graph, name, self.weights[name])
        elif levels is not None:
            source, weight = (argument(next(iter(node.users)), place) for place in (0, 1))
            setattr(self.graph, name, BiasQuantizer(self.ranges[str(source.target)], partial(self._levels, weight)))

    def _levels(self, quantizer: fx.Node) -> Grid | Codebook:
        """The levels of a weight as it is now."""
        weight = self.graph.get_parameter(str(quantizer.all_input_nodes[0].target))
        return self.weights[str(quantizer.target)].found(weight)

    def _floor(self, layer: fx.Node, levels: Grid | Codebook) -> Floor | None:
        fine = isinstance(levels, Grid) and levels.bits == LARGEST_BITS and levels.qmin < 0
        if not (self.given.plan.saturation_free and fine) or is_depthwise(layer):
            return None
        axis = levels.axis
        return lambda weight: saturation_free_scale(weight, axis)


def learnt_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The `get_attr` nodes of weights and biases of layers and of scales and shifts of BatchNorms, behind their quantizers."""
    read: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if is_call(node, WEIGHTED | {aten.batch_norm.default}):
            read.update(argument for argument in node.args[1:3] if isinstance(argument, fx.Node))
    stored = {unquantized(node) for node in read}
    return [node for node in graph.graph.nodes if node in stored and node.op == "get_attr"]
