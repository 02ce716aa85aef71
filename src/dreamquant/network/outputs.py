"""What a network answers: its outputs, each of a kind, and how the kind is known.

A network has one or more outputs; `find_outputs` tells for each where its images lie and of what kind it is. What is known of
a kind is `stated` by the user, read off the `graph` (a softmax, a sigmoid, weights that were trained by a softmax), off the
`values` (vectors of length 1), off its `name` in the file (logits), or only off the `shape`: then it is a guess, said as one,
and nothing is promised by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dreamquant.errors import ModelError, OptionError, unknown
from dreamquant.network.batch import images_axis
from dreamquant.network.graph import Network, Source, aten, output_nodes, outputs_of, run_once, tensor_of
from dreamquant.network.interpreter import interpret
from dreamquant.network.notes import is_tensor
from dreamquant.network.operators import (
    PASSTHROUGH,
    PRODUCTS,
    SOFTMAX,
    WEIGHTED,
    bias_node,
    data_nodes,
    is_call,
    output_channel_axis,
)

CLASSES, MULTILABEL, DENSE, FEATURES = "classes", "multilabel", "dense classes", "features"
SEQUENCE, REGIONS, VALUES = "sequence classes", "regions", "values"
KINDS = {
    CLASSES: "one score a class and image, (N, K), or one score for yes and no",
    MULTILABEL: "labels of which any may hold, (N, K)",
    DENSE: "classes of each pixel, (N, K, H, W), or maps of yes and no",
    FEATURES: "an embedding, compared by its direction",
    SEQUENCE: "classes of each step, (N, T, K) or (T, N, K)",
    REGIONS: "boxes and their scores in one tensor",
    VALUES: "numbers: a regression, an image, whatever else",
}
STATED, NAMED, GRAPH, MEASURED, SHAPE = "stated", "name", "graph", "values", "shape"
SQUASHING: set[Any] = {aten.sigmoid.default, aten.hardsigmoid.default} | SOFTMAX
POOLING: set[Any] = {aten.mean.dim, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
FEW = 4  # numbers that one point, size, box, rotation or colour takes: so few may be any of these as well as classes
CHANCE = 2.33  # standard deviations: what rows that do not know of each other pass once in a hundred times
SAME = 1e-4  # of 1: sums of float32 probabilities, lengths of float32 vectors
BOX = 4  # coordinates of a box
HIGH = 0.1  # of a class's score where there is nothing: one that nothing weighs is trained to be near 0 there
TRIED = 4  # images that outputs are looked at on


@dataclass(frozen=True)
class Output:
    """One output of a network.

    `axis` is that of the images in what the graph returns, None where it does not depend on them; everywhere else answers have
    the images first: `shape` is that of one image's. `kind` is one of `KINDS`, `known` how that is known and `why` says so in
    words. `form` is what its scores are ("logits", "probabilities" that sum to 1, "sigmoid"), "numbers" of values that are whole
    or yes and no, else empty; `places` the axis of classes, or of a box's columns, in an answer (N, ...). Of regions, `scores`
    are the columns of scores, all others are coordinates, and `objectness` says that the first of them weighs the rest.
    """

    name: str
    kind: str
    known: str
    why: str
    axis: int | None
    shape: tuple[int, ...]
    form: str = ""
    places: int = 1
    scores: tuple[int, ...] = ()
    objectness: bool = False

    def by_image(self, value: Tensor, count: int) -> Tensor:
        """What the graph returned for `count` images, with the images first; rows of one image in an axis of their own."""
        if self.axis is None:
            return value.expand(count, *value.shape)
        moved = value.movedim(self.axis, 0) if value.dim() else value[None]
        return moved if len(moved) == count else moved.reshape(count, len(moved) // count, *moved.shape[1:])

    @property
    def classes(self) -> int:
        """How many classes it scores for an image, two where it is one score for yes and no; 0 for all other kinds."""
        return max(2, self.shape[0] if self.shape else 1) if self.kind == CLASSES else 0

    @property
    def certain(self) -> bool:
        """Whether more than the shape speaks for the kind."""
        return self.known != SHAPE

    def __str__(self) -> str:
        sizes = ", ".join(["N", *map(str, self.shape)])
        if self.known == STATED:
            return f"{self.name} ({sizes}): {self.kind}, as stated"
        told = f"{self.name} ({sizes}): {self.kind} by {self.why}"
        return told if self.certain else f"{told}; if it is not, state it: --outputs {self.name}=KIND"


def class_output(outputs: Iterable[Output]) -> int | None:
    """The place of the first output of classes: what a dreamer may aim at; None where there is none."""
    return next((place for place, output in enumerate(outputs) if output.kind == CLASSES), None)


def main_output(outputs: Iterable[Output]) -> int:
    """The place of the output that is told of first: that of classes, else the first that depends on the images."""
    known = list(outputs)
    found = class_output(known)
    return found if found is not None else next((place for place, one in enumerate(known) if one.axis is not None), 0)


def restated(network: Network, stated: Mapping[str, str]) -> tuple[Output, ...]:
    """A network's outputs with what the user says of them, by name. `OptionError` for a name or a kind that is not known, or
    that the output's shape cannot be."""
    names = [output.name for output in network.outputs]
    for name in stated:
        if name not in names:
            raise OptionError(unknown("output", name, names))
    chosen = {name: _kind_named(kind) for name, kind in stated.items()}
    if not chosen:
        return network.outputs
    seen = _Seen(network.graph, _noise(network))
    return tuple(
        _stated(output, chosen[output.name], seen.answer(place, output)) if output.name in chosen else output
        for place, output in enumerate(network.outputs)
    )


def _noise(network: Network) -> Tensor:
    """Images of independent pixels, with the mean and deviation of the input space."""
    centre, spread = network.space.statistics(network.input_shape[0])
    noise = torch.randn((network.batch or TRIED, *network.input_shape), generator=torch.Generator().manual_seed(0))
    return network.space.snapped(noise * spread + centre)


def _kind_named(text: str) -> str:
    plain = text.strip().lower().replace("-", " ").replace("_", " ")
    found = {"dense": DENSE, "sequence": SEQUENCE}.get(plain, plain)
    if found not in KINDS:
        raise OptionError(unknown("kind of output", text, KINDS))
    return found


# ---- where the images are


def find_outputs(network: Network) -> tuple[Output, ...]:
    """The outputs of a network, whose own are not looked at.

    Every tensor-valued node needs its shape. Raises `ModelError` for an output that is the input itself, or that is one
    for a whole batch of images.
    """
    graph, batch, source = network.graph, network.batch, network.source
    nodes, names = output_nodes(graph.graph), _names(graph, source)
    computed = set(data_nodes(graph.graph))
    images = _noise(network)
    seen = _Seen(graph, images)
    other = images[: TRIED - 1] if batch is None else torch.cat([images[:-1], images[-1:] + 1.0])
    again = run_once(graph, other)
    found = []
    for place, (node, name) in enumerate(zip(nodes, names, strict=True)):
        if node.op == "placeholder":
            raise ModelError(f"{source.text}: the output {name!r} is the input itself; a network without it is needed")
        axis = None
        if node in computed:
            axis = _axis(seen.values[place], again[place], len(images), batch)
            if axis is None:
                sizes = tuple(seen.values[place].shape)
                raise ModelError(
                    f"{source.text}: the output {name!r} is {sizes} for {len(images)} images and has no axis of theirs; an"
                    " answer to each image is needed"
                )
        blank = Output(name, VALUES, SHAPE, "", axis, ())
        answer = seen.answer(place, blank)
        blank = replace(blank, shape=tuple(answer.value.shape[1:]))
        found.append(_inferred(blank, answer, graph, node, network.input_shape))
    return tuple(found)


def _names(graph: fx.GraphModule, source: Source) -> list[str]:
    """What the outputs are called in the file that was read, or in the one that will be written."""
    if source.ends:
        return list(source.ends)
    count = len(output_nodes(graph.graph))
    return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]


def _axis(value: Tensor, other: Tensor, count: int, batch: int | None) -> int | None:
    """The axis of the images: whose size changes with their number or, for a graph of one batch size, along which only
    the last image's share changes with that image or, of one whose images mix, whose size is the batch's. None where there is
    none."""
    if batch is None:
        return images_axis(value.shape, count, other.shape, count - 1)
    if batch == 1:
        return next((axis for axis, size in enumerate(value.shape) if size == 1), 0)
    changed = ~((value == other) | (value.isnan() & other.isnan()))
    shares = [(axis, size // count) for axis, size in enumerate(value.shape) if size and size % count == 0]
    apart = [axis for axis, share in shares if not changed.movedim(axis, 0)[:-share].any()]
    return next(iter(apart or [axis for axis, share in shares if share == 1]), None)


# ---- what an output shows


@dataclass(frozen=True)
class _Answer:
    """An output on a few images, (N, ...), and which of its numbers are scores: what a last sigmoid or softmax gives."""

    value: Tensor
    scored: Tensor


class _Seen:
    """The outputs on images, and which of their numbers are scores.

    A number is a score if it is 1 where all last sigmoids and softmaxes give ones, and 0 where they give zeros: what hands
    them on, or takes their products or the largest of them, is one; a coordinate that is decoded from them is not.
    """

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        self.count, self.values = len(images), run_once(graph, images)
        last = _last_squashings(graph.graph)
        self.scored = [torch.zeros_like(value, dtype=torch.bool) for value in self.values]
        if last:
            zeros, ones = (_held(graph, last, level, images) for level in (0.0, 1.0))
            self.scored = [(zero == 0) & ((one.double() - 1).abs() < SAME) for zero, one in zip(zeros, ones, strict=True)]

    def answer(self, place: int, output: Output) -> _Answer:
        value, scored = (output.by_image(one[place], self.count) for one in (self.values, self.scored))
        return _Answer(value, scored)


def _held(graph: fx.GraphModule, nodes: Collection[fx.Node], level: float, images: Tensor) -> list[Tensor]:
    """The outputs of a graph in which some nodes give nothing but one number."""
    with torch.no_grad():
        held = interpret(graph, images, after=lambda node, value: torch.full_like(value, level) if node in nodes else value)
    return outputs_of(held)


def _last_squashings(graph: fx.Graph) -> set[fx.Node]:
    """The sigmoids and softmaxes behind which no layer and no product of computed tensors comes."""
    inner: set[fx.Node] = set()
    found = set()
    for node in reversed(graph.nodes):
        if node in inner or is_call(node, WEIGHTED | PRODUCTS):
            inner.update(node.all_input_nodes)
        elif is_call(node, SQUASHING):
            found.add(node)
    return found


# ---- the kind


def _inferred(output: Output, answer: _Answer, graph: fx.GraphModule, node: fx.Node, input_shape: tuple[int, int, int]) -> Output:
    """An output with the kind that the graph, its values and its shape speak for, in this order."""
    if output.axis is None:
        return replace(output, known=GRAPH, why="the graph: it does not depend on the images")
    if not answer.value.is_floating_point():
        kept = str(answer.value.dtype).removeprefix("torch.")
        return replace(output, known=GRAPH, why=f"the graph: its numbers are {kept}, compared as equal or not", form="numbers")
    rank, share = answer.value.dim(), answer.scored.double().mean().item()
    summed = _sums_to_one(answer.value)
    if summed is not None:
        kind = {2: CLASSES, 3: SEQUENCE}.get(rank, CLASSES if _is_pooled(output) else DENSE)
        form, text = summed[1], "the graph: a softmax ends it"
        return replace(output, kind=kind, known=GRAPH, why=text, form=form, places=summed[0])
    if share == 1:
        kind = DENSE if rank > 2 and not _is_pooled(output) else CLASSES if answer.value[0].numel() == 1 else MULTILABEL
        return replace(output, kind=kind, known=GRAPH, why="the graph: a sigmoid ends it", form="sigmoid")
    if 0 < share < 1:
        columns = _columns(answer)
        if columns is None:
            return replace(output, why="its shape: some of its numbers are scores, but not by columns")
        return _regions(replace(output, known=GRAPH), answer, *columns)
    if _has_length_one(answer.value):
        return replace(output, kind=FEATURES, known=MEASURED, why="its values: vectors of length 1")
    return _of_raw(output, answer, graph, node, input_shape)


def _of_raw(output: Output, answer: _Answer, graph: fx.GraphModule, node: fx.Node, input_shape: tuple[int, int, int]) -> Output:
    """The kind of an output that ends in a layer, or in arithmetic."""
    value = answer.value
    pooled = value.dim() == 2 or _is_pooled(output)
    axis = value.dim() - 1 if value.dim() == 3 else 1
    width = value.shape[axis] if value.dim() > 1 else 1
    kind = CLASSES if pooled else {3: SEQUENCE, 4: DENSE}.get(value.dim(), VALUES)
    if width == 1 or kind == VALUES:
        return replace(output, why="its shape: one number may be a score or any other value" if width == 1 else "its shape")
    layer, biased, linear = _last_layer(node)
    shaped = layer is not None and biased
    if layer is not None and linear and _compete(graph, layer, width):
        text = "the graph: the weights of its last layer sum to little, as a softmax trains them"
        return replace(output, kind=kind, known=GRAPH, why=text, form="logits", places=axis)
    if width <= FEW:
        return replace(output, why=f"its shape: {width} numbers that nothing shows to be scores")
    if kind == DENSE and tuple(value.shape[2:]) != input_shape[1:]:
        return replace(output, why="its shape: maps that are not of the image's size")
    if shaped:
        called = "logit" in output.name.lower()
        text = "its name" if called else f"its shape: {width} numbers of a last layer with a bias"
        return replace(output, kind=kind, known=NAMED if called else SHAPE, why=text, form="logits", places=axis)
    if kind == DENSE:
        return replace(output, why="its shape: maps of no last layer with a bias")
    return replace(output, kind=FEATURES, why=f"its shape: {width} numbers of no last layer with a bias")


def _stated(output: Output, kind: str, answer: _Answer) -> Output:
    """An output as the user says that it is; `OptionError` where it cannot be."""
    stated = replace(output, kind=kind, known=STATED, why="", form="", places=1, scores=(), objectness=False)
    value, rank = answer.value, answer.value.dim()
    pooled = rank <= 2 or _is_pooled(output)
    fits = {CLASSES: pooled, MULTILABEL: pooled and rank > 1, DENSE: rank > 2, SEQUENCE: rank == 3, REGIONS: rank == 3}
    if not fits.get(kind, True) or output.axis is None or not value.is_floating_point():
        raise OptionError(f"the output {output.name!r} is {_sizes(output)} and cannot be {kind}: {KINDS[kind]}")
    if kind in (FEATURES, VALUES):
        return stated
    if kind == REGIONS:
        columns = _columns(answer)
        if columns is None:
            raise OptionError(
                f"the output {output.name!r} cannot be regions: its columns of scores are found by the sigmoid or softmax that"
                " ends them, and there are none beside four coordinates; state it as values"
            )
        return _regions(stated, answer, *columns)
    summed = _sums_to_one(value)
    axis = summed[0] if summed else rank - 1 if kind == SEQUENCE else 1
    form = summed[1] if summed else "sigmoid" if bool(answer.scored.all()) else "logits"
    return replace(stated, form=form, places=axis)


def _sizes(output: Output) -> str:
    return f"({', '.join(['N', *map(str, output.shape)])})"


def _is_pooled(output: Output) -> bool:
    """Whether there is one row of numbers an image, maps of one pixel included."""
    return len(output.shape) > 1 and output.shape[1:] == (1,) * (len(output.shape) - 1)


def _sums_to_one(value: Tensor) -> tuple[int, str] | None:
    """The axis along which an output's numbers, or their exponentials, are probabilities of classes; None where there is none."""
    axes = [axis for axis in (1, value.dim() - 1) if value.dim() > 1 and value.shape[axis] > 1]
    for axis in axes:
        if bool((value >= 0).all()) and bool(((value.sum(axis) - 1).abs() < SAME).all()):
            return axis, "probabilities"
        if bool((value <= 0).all()) and bool((value.logsumexp(axis).abs() < SAME).all()):
            return axis, "logits"
    return None


def _has_length_one(value: Tensor) -> bool:
    axes = [axis for axis in (1, value.dim() - 1) if value.dim() > 1 and value.shape[axis] > 1]
    return any(bool(((torch.linalg.vector_norm(value, dim=axis) - 1).abs() < SAME).all()) for axis in axes)


def _columns(answer: _Answer) -> tuple[int, tuple[int, ...]] | None:
    """The axis of a box's columns and the places of the scores in it; None where it is no tensor of boxes and scores."""
    if answer.value.dim() != 3:
        return None
    for axis in (2, 1):
        rows = answer.scored.movedim(axis, 0).flatten(1)
        scores = tuple(int(place) for place in rows.all(1).nonzero())
        if bool((rows.all(1) | ~rows.any(1)).all()) and scores and len(rows) - len(scores) >= BOX:
            return axis, scores
    return None


def _regions(output: Output, answer: _Answer, axis: int, scores: tuple[int, ...]) -> Output:
    """An output of boxes: whether the first score weighs the others is told by these, which are then high where it is low."""
    told = answer.value.movedim(axis, -1)[..., list(scores)]
    weighs = len(scores) > 1 and bool(told[..., 1:].amax(-1).median() > HIGH) and bool(told[..., 0].median() < HIGH)
    text = output.why or f"the graph: {len(scores)} of {answer.value.shape[axis]} columns end in a sigmoid or softmax"
    return replace(output, kind=REGIONS, why=text, form="sigmoid", places=axis, scores=scores, objectness=weighs)


def _last_layer(node: fx.Node) -> tuple[fx.Node | None, bool, bool]:
    """The layer that an output is, but for rearranging, pooling and ReLU; whether it has a bias, and is all that is linear."""
    biased, linear = False, True
    while not is_call(node, WEIGHTED):
        inputs = [one for one in node.all_input_nodes if is_tensor(one) and one.op != "get_attr"]
        adds = is_call(node, {aten.add.Tensor}) and any(one.op == "get_attr" for one in node.all_input_nodes)
        if len(inputs) != 1 or not (adds or is_call(node, PASSTHROUGH | POOLING | {aten.relu.default})):
            return None, False, False
        biased, linear = biased or adds, linear and not is_call(node, {aten.relu.default})
        node = inputs[0]
    return node, biased or bias_node(node) is not None, linear


def _compete(graph: fx.GraphModule, layer: fx.Node, width: int) -> bool:
    """Whether the rows of a last layer's weights (one an output) sum to less than rows would that do not know of each other.

    The gradient of a cross entropy sums to zero over the classes, so that training by it moves the rows apart and never
    together, and weight decay takes the sum that they began with. Of independent rows, K |mean row|^2 / mean |row|^2 is 1, with
    the deviation sqrt(2 (1 - 1 / K) / columns).
    """
    source = layer.args[1]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    weight = tensor_of(graph, source)
    rows = weight.double().movedim(output_channel_axis(layer), 0).flatten(1)
    power = rows.square().mean(0)
    if len(rows) != width or not bool(power.any()):
        return False
    ratio = len(rows) * rows.mean(0).square().sum() / power.sum()
    columns = power.sum().square() / power.square().sum()
    return bool(1 - ratio > CHANCE * (2 * (1 - 1 / width) / columns).sqrt())
