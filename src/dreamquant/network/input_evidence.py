"""What a network itself tells of the numbers that it is fed: its first operations, its first BatchNorm, its first biases.

`preprocessing` reads what the graph does to the image before its first layer. `remembered` asks the first BatchNorm what images
it was trained on: as long as everything before it is affine, its running mean is linear in the images' channel means, and its
running variance in the power of what images are made of. `bias_size` weighs, where BatchNorms are folded or never were, the first
layer's response against its bias: numbers of another order of magnitude leave one of the two without a say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.network.front import constants
from dreamquant.network.graph import Network, aten, input_node, needed_by, tensor_of, whole_batches
from dreamquant.network.interpreter import interpret
from dreamquant.network.notes import is_tensor, shape_of
from dreamquant.network.operators import WEIGHTED, bias_node, data_inputs, is_call
from dreamquant.network.statistics import batch_norms

IMAGES = 8
AFFINE = 1e-3  # how far from affine, of its own size, the path to a BatchNorm may be: rounding
DIGITS = 5  # of what is remembered: those after them differ from run to run, and would make other images
CONSISTENT = 0.5  # deviations that its running means may be from what one mean per channel of the images makes of them
ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar}
CASTS = {aten._to_copy.default, aten.to.dtype}
MOVES = {aten.permute.default, aten.transpose.int}
BATCH_NORM = {aten.batch_norm.default}


# ---- the graph's own preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """What the graph does to the image, channel by channel, before anything else: (x - `mean`) / `std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing(network: Network) -> Preprocessing | None:
    """The products and sums with constants that the image goes through first; None where there are none.

    Those behind a Cast, a Transpose or a resize count too; anything that mixes values of different channels ends the search.
    """
    channels = network.input_shape[0]
    last = _end_of_affine(network)
    if last is None:
        return None
    run = _prefix(network, last)
    zero, one = run(torch.zeros(1, *network.input_shape)), run(torch.ones(1, *network.input_shape))
    axis = _channel_axis(last, channels)
    offset, ends = (_by_channel(value, axis) for value in (zero, one))
    scale = [end - start for start, end in zip(offset, ends, strict=True)]
    untouched = all(abs(value) < 1e-6 for value in offset) and all(abs(value - 1) < 1e-6 for value in scale)
    if untouched or not all(math.isfinite(value) and value > 0 for value in scale):
        return None
    return Preprocessing(
        tuple(-start / factor for start, factor in zip(offset, scale, strict=True)), tuple(1 / factor for factor in scale)
    )


def _end_of_affine(network: Network) -> fx.Node | None:
    """The last of the element-wise products and sums with constants that the image goes through one after the other."""
    node, found, fixed = input_node(network.graph.graph), None, constants(network.graph.graph)
    while True:
        users = [user for user in node.users if user.op == "call_function"]
        if len(users) != 1 or not is_tensor(users[0]):
            return found
        node = users[0]
        sources = node.all_input_nodes
        sizes = {math.prod(shape_of(source)) for source in sources if source in fixed}
        single = sum(source not in fixed for source in sources) == 1
        if is_call(node, ELEMENTWISE) and single and sizes <= {1, network.input_shape[0]}:
            found = node
        elif not is_call(node, CASTS | MOVES | {aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec}):
            return found


def _channel_axis(node: fx.Node, channels: int) -> int:
    shape = shape_of(node)
    return 1 if shape[1] == channels else len(shape) - 1


def _by_channel(value: Tensor, axis: int) -> list[float]:
    moved = value[0].movedim(axis - 1, 0).flatten(1)
    means: list[float] = moved.double().mean(1).tolist()
    return means


# ---- what the first BatchNorm remembers


@dataclass(frozen=True)
class Remembered:
    """Mean, one number a channel, and deviation of the images that the BatchNorm `name` was trained on."""

    name: str
    mean: tuple[float, ...]
    deviation: float


def remembered(network: Network) -> Remembered | None:
    """What the first BatchNorm tells of the images; None where there is none, or where it cannot tell.

    With everything before it affine, its input's channel means are b + M mu, with M the response to an image that is one in one
    channel: mu is found by least squares. Its variances are those of mu itself at the borders, and a sum over what images are
    made of, each at a power of its own: a flat brightness, 1/f texture that all channels share or that each has for itself, and
    white noise likewise. The powers, none negative, are found by least squares too, and their sum is the images' variance.
    """
    norm = next((node for node in network.graph.graph.nodes if is_call(node, BATCH_NORM)), None)
    if norm is None:
        return None
    statistics = batch_norms(network)[0]
    run, (channels, height, width) = _prefix(network, norm.args[0]), network.input_shape
    generator = torch.Generator().manual_seed(0)
    zero = run(torch.zeros(1, *network.input_shape))
    if len(zero) != 1:
        return None  # places of all images in a row: which are whose is not known
    units = torch.eye(channels).view(channels, channels, 1, 1).expand(-1, -1, height, width)
    responses = torch.stack([_mean(run(unit[None]) - zero) for unit in units], 1).double()
    parts = list(_ingredients(channels, height, width, generator))
    textures = [run(part) - zero for part in parts]
    twice = run(2 * parts[0]) - zero
    if not _small(twice - 2 * textures[0], twice):
        return None
    mean, deviation = statistics.mean.double(), statistics.std.double()
    powers = torch.stack([responses.sum(1).square(), *(_variance(texture).double() for texture in textures)], 1)
    live = (powers.sum(1) > 1e-9 * powers.sum(1).max()) & (deviation > 1e-3 * deviation.max())
    # in units of each channel's own deviation
    slopes, wanted = (responses / deviation[:, None])[live], ((mean - _mean(zero).double()) / deviation)[live]
    if len(slopes) < channels or torch.linalg.matrix_rank(slopes) < channels:
        return None
    centre = torch.linalg.lstsq(slopes, wanted[:, None]).solution[:, 0]
    if (slopes @ centre - wanted).square().mean().sqrt() > CONSISTENT:
        return None
    base = run(centre.float().view(1, -1, 1, 1).expand(1, -1, height, width))
    rest = (1 - _variance(base).double() / deviation.square()).clamp(min=0)[live]
    power = _nonnegative((powers / deviation.square()[:, None])[live], rest).sum()
    if not math.isfinite(float(power)) or power <= 0:
        return None
    told = [float(f"{number:.{DIGITS}g}") for number in (*centre.tolist(), float(power.sqrt()))]
    return Remembered(norm.name, tuple(told[:-1]), told[-1])


def _ingredients(channels: int, height: int, width: int, generator: torch.Generator) -> Iterator[Tensor]:
    """What images are made of, (IMAGES, C, H, W) each, of deviation 1: 1/f texture and white noise, shared or by channel."""
    for shared in (True, False) if channels > 1 else (True,):
        drawn = 1 if shared else channels
        texture = torch.stack([one_over_f(height, width, generator) for _ in range(IMAGES * drawn)])
        yield texture.view(IMAGES, drawn, height, width).expand(-1, channels, -1, -1)
        yield torch.randn((IMAGES, drawn, height, width), generator=generator).expand(-1, channels, -1, -1)


def one_over_f(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise (H, W) with amplitude 1/f and deviation 1 (Field, JOSA A 1987)."""
    frequency = (torch.fft.fftfreq(height).view(-1, 1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    frequency[0, 0] = torch.inf
    spectrum = torch.fft.rfft2(torch.randn((height, width), generator=generator)) / frequency
    noise: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return noise / noise.std().clamp(min=1e-6)


def _mean(features: Tensor) -> Tensor:
    return features.transpose(0, 1).flatten(1).mean(1)


def _variance(features: Tensor) -> Tensor:
    return features.transpose(0, 1).flatten(1).var(1, correction=0)


def _small(difference: Tensor, size: Tensor) -> bool:
    return bool(difference.abs().mean() <= AFFINE * size.abs().mean())


def _nonnegative(rows: Tensor, wanted: Tensor) -> Tensor:
    """The least-squares solution with no negative number, by trying every set of columns: there are five at most."""
    best, found = math.inf, torch.zeros(rows.shape[1], dtype=rows.dtype)
    columns = range(rows.shape[1])
    for chosen in itertools.chain.from_iterable(itertools.combinations(columns, size) for size in range(1, rows.shape[1] + 1)):
        part = rows[:, chosen]
        solution = torch.linalg.lstsq(part, wanted[:, None]).solution[:, 0]
        error = float((part @ solution - wanted).square().sum())
        if bool((solution >= 0).all()) and error < best * (1 - 1e-9):
            best, found = error, torch.zeros_like(found)
            found[list(chosen)] = solution
    return found


# ---- the size of the first biases


def bias_size(network: Network) -> float | None:
    """How large the first layer's response to images of deviation 1 is beside its bias (root mean squares over channels).

    The images are 1/f texture of brightnesses that share its power. None where the first layer has no bias, or where its path
    from the image is not affine. In trained networks the two are of one order of magnitude under the numbers that they were
    trained on.
    """
    nodes = network.graph.graph.nodes
    layer = next((node for node in nodes if is_call(node, WEIGHTED) and data_inputs(node)), None)
    if layer is None:
        return None
    bias = bias_node(layer)
    if bias is None or bias.op != "get_attr":
        return None
    run = _prefix(network, layer)
    generator = torch.Generator().manual_seed(0)
    texture = next(_ingredients(*network.input_shape, generator)) + torch.randn((IMAGES, 1, 1, 1), generator=generator)
    texture = texture / texture.std()
    zero = run(torch.zeros(1, *network.input_shape))
    response, twice = run(texture) - zero, run(2 * texture) - zero
    against = float(tensor_of(network.graph, bias).square().mean().sqrt())
    if not against or not _small(twice - 2 * response, twice):
        return None
    return float(_variance(response if response.dim() == 4 else response.movedim(-1, 1)).mean().sqrt()) / against


def _prefix(network: Network, last: fx.Node) -> Callable[[Tensor], Tensor]:
    """The part of a network that computes `last`, as a function of images; what was added to fill a batch is left out."""
    graph, needed = network.graph, needed_by([last])
    nodes = [node for node in graph.graph.nodes if node in needed]

    def run(batch: Tensor) -> Tensor:
        whole = whole_batches(batch, network.batch)
        with torch.no_grad():
            found: list[Any] = [interpret(graph, piece, nodes=nodes) for piece in torch.split(whole, network.batch or len(whole))]
        result = torch.cat(found).float()
        return result[: len(result) // len(whole) * len(batch)]

    return run
