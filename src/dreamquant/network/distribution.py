"""What BatchNorm statistics say of every activation: mean, deviation and range of each channel, with no image seen.

BatchNorm's beta and gamma are mean and deviation of its output on the training data. From there they are followed through the
operations behind it, the output of a layer taken to be normally distributed (Nagel et al., ICCV 2019, section 4.2.1).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.graph import Network, aten, device_of, is_input, tensor_of
from dreamquant.network.interpreter import call
from dreamquant.network.notes import is_tensor, notes, shape_of
from dreamquant.network.operators import CLIPPING, LINEARS, PASSTHROUGH, WEIGHTED, argument, data_inputs, is_call, unquantized
from dreamquant.network.pairs import PADS

FAR = 40.0  # deviations; beyond them lies nothing
QUANTILES = 256  # by which smooth functions of a normal variable are averaged

AFFINE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}  # with a stored tensor or a number
SMOOTH = {
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.gelu.default,
    aten.elu.default,
    aten.tanh.default,
}
# monotone in each value and, but for maxima, linear: applied to means and ends of ranges as to the values themselves
AVERAGING = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
SPLITTING = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.adaptive_max_pool2d.default,
}


@dataclass(frozen=True)
class Distribution:
    """Mean, standard deviation and range of a tensor's values; each broadcasts to one image's value, as (1, C, 1, 1) does."""

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Distribution:
        """The distribution whose four tensors are `function` of these."""
        return Distribution(function(self.mean), function(self.deviation), function(self.low), function(self.high))

    def typical(self) -> Tensor:
        """Values (256, ...) that stand for a normal variable: from equally many quantiles of each element of `mean`."""
        places = (torch.arange(QUANTILES, dtype=torch.float64, device=self.mean.device) + 0.5) / QUANTILES
        shape = (-1, *[1] * self.mean.dim())
        values: Tensor = self.mean + self.deviation * torch.special.ndtri(places).view(shape)
        return values


def distributions(network: Network, *, deviations: float = 6.0) -> dict[fx.Node, Distribution]:
    """The distribution of each node's values, where it can be told, as float64; nodes of which nothing is known are left out.

    A layer whose BatchNorm was folded (its notes' `normal`), or a BatchNorm, gives N(beta, gamma) and the range
    beta +- `deviations` gamma; activation functions clip or bend both. Of what enters a BatchNorm that was not folded, mean and
    deviation are those that it remembers. Any other layer gives mean W E[x] + b and variance
    W^2 Var[x], its inputs taken to be independent; so are the two sides of a sum or product. What a pooling averages is taken to
    vary together, so its deviations and ranges are upper bounds, and a maximum is taken for the largest mean, a lower bound.
    Images have the mean of `Network.input_statistics`, and the range of pixels in 0..1 where the normalisation is known.
    Quantizers of a student are looked through.
    """
    known: dict[fx.Node, Distribution] = {}
    for node in network.graph.graph.nodes:
        found = _image(network, deviations) if is_input(node) else _of(network.graph, node, known, deviations)
        found = _entering_norm(network.graph, node, found, deviations)
        if found is not None:
            known[node] = found
    return known


def has_statistics(graph: fx.Graph) -> bool:
    """Whether a graph has BatchNorms, or layers that know of one that was folded into them."""
    return any(notes(node).normal is not None or is_call(node, {aten.batch_norm.default}) for node in graph.nodes)


def clip_ends(node: fx.Node) -> tuple[float, float]:
    """The ends (low, high) between which a clipping activation keeps its values; an end that is open is infinite."""
    given = [*node.args[1:], *[None] * 2][:2]
    low, high = node.kwargs.get("min", given[0]), node.kwargs.get("max", given[1])
    if node.target is aten.relu.default:
        low, high = 0.0, None
    elif node.target is aten.hardtanh.default:
        low = node.kwargs.get("min_val", -1.0 if low is None else low)
        high = node.kwargs.get("max_val", 1.0 if high is None else high)
    ends: Any = (-math.inf if low is None else low, math.inf if high is None else high)
    return float(ends[0]), float(ends[1])


# --- node by node -----------------------------------------------------------------------------------------------------


def _image(network: Network, deviations: float) -> Distribution:
    mean, deviation = (values.double().unsqueeze(0) for values in network.input_statistics)
    ends = network.space.ends()
    if ends is None:
        return _normal(mean, deviation, deviations)
    black, white = (end.to(mean).unsqueeze(0) for end in ends)
    return Distribution(mean, deviation, black, white)


def _normal(mean: Tensor, deviation: Tensor, deviations: float) -> Distribution:
    return Distribution(mean, deviation, mean - deviations * deviation, mean + deviations * deviation)


def _of(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Distribution], deviations: float) -> Distribution | None:
    if node.op == "call_module":  # a quantizer
        return known.get(node.all_input_nodes[0])
    normal = notes(node).normal
    if normal is not None:
        beta, gamma = (_along_channels(node, values) for values in normal)
        return _normal(beta, gamma, deviations)
    if is_call(node, {aten.batch_norm.default}):
        return _batch_norm(graph, node, deviations)
    if node.op != "call_function" or not is_tensor(node):
        return None
    entering = [known[source] for source in _sources(node) if source in known]
    if not entering or len(entering) < len(_sources(node)):
        return None
    return _computed(graph, node, entering, known, deviations)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node computes from, other than stored ones."""
    if is_call(node, WEIGHTED):  # the weight may have a quantizer
        return [argument(node, 0)]
    return data_inputs(argument(node, 0) if node.target is operator.getitem else node)


def _computed(
    graph: fx.GraphModule, node: fx.Node, entering: list[Distribution], known: dict[fx.Node, Distribution], deviations: float
) -> Distribution | None:
    x = entering[0]
    if is_call(node, WEIGHTED):
        return _layer(graph, node, x, deviations)
    if is_call(node, CLIPPING | {aten.minimum.default}):
        return _clipped(graph, node, known)
    if is_call(node, {aten.leaky_relu.default, aten.prelu.default}):
        return _leaky(x, _slope(graph, node))
    if is_call(node, SMOOTH):
        return _bent(x, lambda values: _call(node, values))
    if is_call(node, AFFINE) and len(entering) == 1:
        return _affine(graph, node, x)
    if is_call(node, {aten.add.Tensor}) and not node.kwargs and len(node.args) == 2:
        return _sum(x, entering[1], deviations)
    if is_call(node, {aten.mul.Tensor}):
        return _product(node, x, entering[1])
    if is_call(node, {aten.cat.default}):
        return _joined(node, entering) if len(entering) == len(node.args[0]) else None  # type: ignore[arg-type]
    if is_call(node, PASSTHROUGH | AVERAGING):
        return _rearranged(graph, node, node, x)
    if node.target is operator.getitem and is_call(node.args[0], SPLITTING):
        return _rearranged(graph, node, argument(node, 0), x)
    return None


def _along_channels(layer: fx.Node, values: Tensor) -> Tensor:
    """Values (C,) shaped to broadcast to the layer's output."""
    shape = [1] * len(shape_of(layer))
    shape[-1 if is_call(layer, LINEARS) else 1] = -1
    return values.double().view(shape)


def _batch_norm(graph: fx.GraphModule, node: fx.Node, deviations: float) -> Distribution:
    gamma, beta, mean = (tensor_of(graph, one) if isinstance(one, fx.Node) else None for one in node.args[1:4])
    assert mean is not None
    gamma = torch.ones_like(mean) if gamma is None else gamma.abs()
    beta = torch.zeros_like(mean) if beta is None else beta
    return _normal(_along_channels(node, beta), _along_channels(node, gamma), deviations)


def _entering_norm(graph: fx.GraphModule, node: fx.Node, found: Distribution | None, deviations: float) -> Distribution | None:
    """What is known of a tensor, made better by the running statistics of a BatchNorm that reads it."""
    readers = [user for one in node.users for user in (one.users if one.op == "call_module" else [one])]
    norm = next((user for user in readers if is_call(user, {aten.batch_norm.default})), None)
    if norm is None or not (is_input(node) or node.op == "call_function"):
        return found
    mean, variance = (tensor_of(graph, argument(norm, place)) for place in (3, 4))
    seen = _normal(_along_channels(norm, mean), _along_channels(norm, variance.clamp(min=0).sqrt()), deviations)
    if found is None or is_call(node, WEIGHTED):
        return seen
    return Distribution(seen.mean, seen.deviation, torch.maximum(seen.low, found.low), torch.minimum(seen.high, found.high))


def _layer(graph: fx.GraphModule, node: fx.Node, x: Distribution, deviations: float) -> Distribution | None:
    weight, bias = (_stored(graph, one) for one in (*node.args[1:3], None)[:2])
    if weight is None:
        return None
    mean = run_layer(node, x.mean, weight, bias)
    variance = run_layer(node, x.deviation.square(), weight.square(), None)
    return _normal(_compact(mean), _compact(variance.clamp(min=0).sqrt()), deviations)


def run_layer(node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer makes of one image's values, which `x` broadcasts to, with these weights; float64."""
    target: Any = node.target
    x = x.double().expand(1, *shape_of(node.args[0])[1:])
    result: Tensor = target(x, weight.double(), None if bias is None else bias.double(), *node.args[3:], **node.kwargs)
    return result


def _clipped(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Distribution]) -> Distribution | None:
    """Of a clip, or of several in a row: they are one clip of what enters the first."""
    number = partial(torch.tensor, dtype=torch.float64, device=device_of(graph))
    low, high = number(-math.inf), number(math.inf)
    while is_call(node, CLIPPING | {aten.minimum.default}):
        if node.target is aten.minimum.default:
            ends = [tensor_of(graph, one) for one in node.all_input_nodes if one.op == "get_attr"]
            if len(ends) != 1:
                return None
            least, most = number(-math.inf), ends[0].double()
        else:
            least, most = map(number, clip_ends(node))
        low, high = (torch.minimum(torch.maximum(inner, low), high) for inner in (least, most))
        node = unquantized(data_inputs(node)[0])
    x = known[node]
    mean, power = _clipped_moments(x.mean, x.deviation, low, high)
    lowest, highest = (torch.minimum(torch.maximum(end, low), high) for end in (x.low, x.high))
    return Distribution(mean, _root(power - mean.square()), lowest, highest)


def _clipped_moments(mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """E[y] and E[y^2] of y = min(max(x, low), high) with x ~ N(mean, deviation): the paper's appendix C."""
    deviation = deviation.clamp(min=1e-12)
    low, high = torch.maximum(low, mean - FAR * deviation), torch.minimum(high, mean + FAR * deviation)
    alpha, beta = (low - mean) / deviation, (high - mean) / deviation
    below, above = torch.special.ndtr(alpha), torch.special.ndtr(-beta)
    density = [torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (alpha, beta)]
    inside = 1 - below - above
    first = low * below + high * above + mean * inside + deviation * (density[0] - density[1])
    second = (
        low.square() * below
        + high.square() * above
        + (mean.square() + deviation.square()) * inside
        + deviation * ((mean + low) * density[0] - (mean + high) * density[1])
    )
    return first, second


def _leaky(x: Distribution, slope: Tensor) -> Distribution:
    """max(x, 0) - slope max(-x, 0): the two parts are rectified normal variables that are never above 0 together."""
    zero, open_end = x.mean.new_zeros(()), x.mean.new_tensor(math.inf)
    up, up_power = _clipped_moments(x.mean, x.deviation, zero, open_end)
    down, down_power = _clipped_moments(-x.mean, x.deviation, zero, open_end)
    mean = up - slope * down
    corner = torch.minimum(torch.maximum(zero, x.low), x.high)
    low, high = _hull(torch.where(end > 0, end, slope * end) for end in (x.low, corner, x.high))
    return Distribution(mean, _root(up_power + slope.square() * down_power - mean.square()), low, high)


def _bent(x: Distribution, function: Callable[[Tensor], Tensor]) -> Distribution:
    """Of any element-wise function: averaged over quantiles of the normal distribution, its range searched on [low, high]."""
    shape = (-1, *[1] * x.mean.dim())
    values = function(x.typical())
    places = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64, device=x.mean.device).view(shape)
    seen = function(x.low + (x.high - x.low) * places)
    return Distribution(values.mean(0), values.std(0, correction=0), seen.amin(0), seen.amax(0))


def _affine(graph: fx.GraphModule, node: fx.Node, x: Distribution) -> Distribution:
    """A stored tensor or number added, subtracted, multiplied or divided by."""

    def function(values: Tensor) -> Tensor:
        return _call(node, values, graph)

    low, high = _hull(function(end) for end in (x.low, x.high))
    slope = (function(torch.ones_like(x.mean)) - function(torch.zeros_like(x.mean))).abs()
    return Distribution(function(x.mean), slope * x.deviation, low, high)


def _sum(x: Distribution, y: Distribution, deviations: float) -> Distribution:
    """Both sides at their ends at once is what no value comes near: the range ends where that of a normal variable does."""
    total = _normal(x.mean + y.mean, torch.hypot(x.deviation, y.deviation), deviations)
    low, high = torch.maximum(total.low, x.low + y.low), torch.minimum(total.high, x.high + y.high)
    return Distribution(total.mean, total.deviation, low, high)


def _product(node: fx.Node, x: Distribution, y: Distribution) -> Distribution:
    one, other = (unquantized(source) for source in data_inputs(node))
    for gate, value, source in ((other, one, x), (one, other, y)):
        if is_call(gate, SMOOTH) and unquantized(data_inputs(gate)[0]) is value:  # SiLU and its like, written out
            return _bent(source, lambda values, gate=gate: values * _call(gate, values))  # type: ignore[misc]
    low, high = _hull(a * b for a in (x.low, x.high) for b in (y.low, y.high))
    mean = x.mean * y.mean
    power = (x.mean.square() + x.deviation.square()) * (y.mean.square() + y.deviation.square())
    return Distribution(mean, _root(power - mean.square()), low, high)


def _joined(node: fx.Node, parts: list[Distribution]) -> Distribution:
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    sizes = [shape_of(source) for source in node.args[0]]  # type: ignore[union-attr]
    fields = zip(*((one.mean, one.deviation, one.low, one.high) for one in parts), strict=True)
    whole = [torch.cat([one.expand(size) for one, size in zip(each, sizes, strict=True)], axis) for each in fields]
    return Distribution(*(_compact(one) for one in whole))


def _rearranged(graph: fx.GraphModule, node: fx.Node, call: fx.Node, x: Distribution) -> Distribution | None:
    """Of an operation that moves, repeats, drops, averages or picks the largest of values, or puts zeros beside them.

    `call` is the operation: `node` itself, or what gives several tensors of which `node` takes one.
    """
    if any(not is_tensor(one) for one in call.all_input_nodes):
        return None  # a size that depends on the batch
    if call.target in PADS and isinstance(call.args[-1], int | float) and call.args[-1] != 0:
        return None
    shape = shape_of(_sources(node)[0])

    def function(values: Tensor) -> Tensor:
        result: Any = _call(call, values.expand(shape), graph)
        return _compact(result if call is node else result[node.args[1]])

    return x.map(function)


def _call(node: fx.Node, values: Tensor, graph: fx.GraphModule | None = None) -> Tensor:
    """The node's operation on other values; stored tensors stay."""

    def filled(source: fx.Node) -> Any:
        if source.op != "get_attr":
            return values
        assert graph is not None
        tensor = tensor_of(graph, source)
        return tensor.double() if tensor.is_floating_point() else tensor

    result: Tensor = call(node, {source: filled(source) for source in node.all_input_nodes})
    return result


def _slope(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """LeakyReLU's or PReLU's factor of negative values, shaped to broadcast."""
    if node.target is aten.leaky_relu.default:
        slope = node.args[1] if len(node.args) > 1 else 0.01
        return torch.tensor(slope, dtype=torch.float64, device=device_of(graph))
    shape = [1] * len(shape_of(node))
    shape[1] = -1
    return tensor_of(graph, argument(node, 1)).double().view(shape)


def _stored(graph: fx.GraphModule, node: object) -> Tensor | None:
    """The stored tensor behind an argument of a layer, a quantizer before it or not."""
    if isinstance(node, fx.Node) and unquantized(node).op == "get_attr":
        return tensor_of(graph, unquantized(node))
    return None


def _hull(ends: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of several tensors that broadcast to one another, value by value."""
    found = list(ends)
    return reduce(torch.minimum, found), reduce(torch.maximum, found)


def _root(variance: Tensor) -> Tensor:
    return variance.clamp(min=0).sqrt()


def _compact(values: Tensor) -> Tensor:
    """The values without repetition: an axis along which they are all the same has length 1."""
    for axis in range(values.dim()):
        first = values.narrow(axis, 0, 1)
        if torch.equal(first.expand_as(values), values):
            values = first
    return values
