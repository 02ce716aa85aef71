"""Every output is of a kind, and how that is known is said; what cannot be known is taken for by its shape only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.errors import ModelError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.outputs import KINDS, class_output, main_output
from dreamquant.network.scores import float_answers, knows_classes, scores_classes

SHAPE = (3, 8, 12)


class Ends(nn.Module):
    """A convolution, pooled or not, and what a function makes of it."""

    def __init__(self, ends: Callable[[Ends, Tensor], object], width: int = 10) -> None:
        super().__init__()
        self.ends = ends
        self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, width)
        self.map, self.step = nn.Conv2d(16, width, 1), nn.Linear(16 * 8, width)
        with torch.no_grad():
            for index, layer in enumerate((self.body, self.head, self.map, self.step)):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(index)) / 4)

    def compete(self) -> Ends:
        """With the rows of last layers as cross entropy leaves them: their sum is nothing."""
        with torch.no_grad():
            for layer in (self.head, self.map, self.step):
                layer.weight -= layer.weight.mean(0, keepdim=True)
        return self

    def pooled(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return scores

    def mapped(self, x: Tensor) -> Tensor:
        scores: Tensor = self.map(torch.relu(self.body(x)))
        return scores

    def steps(self, x: Tensor) -> Tensor:
        scores: Tensor = self.step(torch.relu(self.body(x)).flatten(1, 2).transpose(1, 2))
        return scores

    def forward(self, x: Tensor) -> object:
        return self.ends(self, x)


def boxes(net: Ends, x: Tensor, wide: int = 4) -> Tensor:
    """(N, 96, wide + scores): coordinates of sigmoids that are decoded, and scores that are sigmoids."""
    found = net.mapped(x).flatten(2).transpose(1, 2).sigmoid()
    return torch.cat([found[..., :wide] * 2 * 8 - 0.5, found[..., wide:]], 2)


def normalised(net: Ends, x: Tensor) -> Tensor:
    return F.normalize(net.pooled(x), dim=1)


def found(ends: Callable[[Ends, Tensor], object], *, width: int = 10, compete: bool = False) -> Network:
    net = Ends(ends, width).eval()
    return capture(net.compete() if compete else net, SHAPE)


@pytest.mark.parametrize(
    ("ends", "width", "compete", "kind", "known", "form"),
    [
        (Ends.pooled, 10, True, "classes", "graph", "logits"),
        (Ends.pooled, 2, True, "classes", "graph", "logits"),
        (Ends.pooled, 10, False, "classes", "shape", "logits"),
        (Ends.pooled, 3, False, "values", "shape", ""),
        (Ends.pooled, 1, False, "values", "shape", ""),
        (lambda net, x: net.pooled(x).softmax(1), 3, False, "classes", "graph", "probabilities"),
        (lambda net, x: net.pooled(x).log_softmax(1), 3, False, "classes", "graph", "logits"),
        (lambda net, x: net.pooled(x).sigmoid(), 1, False, "classes", "graph", "sigmoid"),
        (lambda net, x: net.pooled(x).sigmoid().squeeze(1), 1, False, "classes", "graph", "sigmoid"),
        (lambda net, x: net.pooled(x).sigmoid(), 10, False, "multilabel", "graph", "sigmoid"),
        (lambda net, x: 255 * net.pooled(x).sigmoid(), 10, False, "features", "shape", ""),
        (lambda net, x: F.hardsigmoid(net.pooled(x)), 10, False, "multilabel", "graph", "sigmoid"),
        (normalised, 10, True, "features", "values", ""),
        (lambda net, x: torch.relu(net.body(x)).mean((2, 3)), 10, False, "classes", "shape", "logits"),
        (lambda net, x: F.layer_norm(net.pooled(x), (10,)), 10, False, "features", "shape", ""),
        (Ends.mapped, 10, True, "dense classes", "graph", "logits"),
        (Ends.mapped, 10, False, "dense classes", "shape", "logits"),
        (Ends.mapped, 3, False, "values", "shape", ""),
        (lambda net, x: F.avg_pool2d(net.mapped(x), 2), 10, False, "values", "shape", ""),
        (lambda net, x: net.mapped(x).softmax(1), 3, False, "dense classes", "graph", "probabilities"),
        (lambda net, x: net.mapped(x).sigmoid(), 1, False, "dense classes", "graph", "sigmoid"),
        (lambda net, x: net.mapped(x).mean((2, 3), keepdim=True), 10, True, "classes", "graph", "logits"),
        (Ends.steps, 10, True, "sequence classes", "graph", "logits"),
        (Ends.steps, 10, False, "sequence classes", "shape", "logits"),
        (lambda net, x: net.steps(x).softmax(2), 3, False, "sequence classes", "graph", "probabilities"),
        (boxes, 10, False, "regions", "graph", "sigmoid"),
        (lambda net, x: boxes(net, x).transpose(1, 2), 10, False, "regions", "graph", "sigmoid"),
        (lambda net, x: boxes(net, x, 2), 10, False, "values", "shape", ""),
        (lambda net, x: net.pooled(x).argmax(1), 10, True, "values", "graph", "numbers"),
    ],
)
def test_kinds_are_found(
    ends: Callable[[Ends, Tensor], object], width: int, compete: bool, kind: str, known: str, form: str
) -> None:
    (output,) = found(ends, width=width, compete=compete).outputs

    assert (output.kind, output.known, output.form, output.axis) == (kind, known, form, 0)
    assert output.certain is (known != "shape")
    assert (f"--outputs {output.name}=KIND" in str(output)) is (known == "shape")


def test_columns_of_boxes_and_scores_are_told_apart() -> None:
    for axis, ends in ((2, boxes), (1, lambda net, x: boxes(net, x).transpose(1, 2))):
        (output,) = found(ends).outputs
        assert (output.places, output.scores) == (axis, tuple(range(4, 10)))


def test_products_of_scores_are_scores() -> None:
    def weighed(net: Ends, x: Tensor) -> Tensor:
        told = boxes(net, x)
        return torch.cat([told[..., :4], told[..., 4:5] * told[..., 5:]], 2)

    (output,) = found(weighed).outputs
    assert (output.kind, output.scores) == ("regions", tuple(range(4, 9)))


def test_a_squeeze_and_excitation_behind_the_last_layer_makes_no_labels() -> None:
    (output,) = found(lambda net, x: net.pooled(x) * net.pooled(x).sigmoid()).outputs
    assert output.kind == "features"


def test_every_output_has_a_kind_and_the_first_of_classes_is_the_main_one() -> None:
    network = found(lambda net, x: (net.body(x).mean((2, 3))[:, :2], net.mapped(x), net.pooled(x)), compete=True)

    assert [output.name for output in network.outputs] == ["output_0", "output_1", "output_2"]
    assert [output.kind for output in network.outputs] == ["values", "dense classes", "classes"]
    assert class_output(network.outputs) == main_output(network.outputs) == 2
    assert [tuple(value.shape) for value in float_answers(network, torch.zeros(5, *SHAPE))] == [
        (5, 2),
        (5, 10, 8, 12),
        (5, 10),
    ]


def test_a_guess_is_not_knowledge() -> None:
    guessed, known = (found(Ends.pooled, compete=compete) for compete in (False, True))

    assert scores_classes(guessed)
    assert scores_classes(known)
    assert (knows_classes(guessed), knows_classes(known)) == (False, True)


# ---- the images


@pytest.mark.parametrize("batch", [1, 2, None])
def test_images_are_found_in_the_second_axis(batch: int | None) -> None:
    """Time first, as networks that read text have it; answers have the images first all the same."""
    module = Ends(lambda net, x: net.steps(x).transpose(0, 1)).eval()
    bound = None if batch is None else torch.export.export(module, (torch.zeros(batch, *SHAPE),))
    network = capture(module, SHAPE) if bound is None else capture(bound)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))

    (output,) = network.outputs
    assert (output.axis, output.shape, output.kind) == (1, (12, 10), "sequence classes")
    torch.testing.assert_close(network(images), module.steps(images), rtol=1e-4, atol=1e-5)


def test_a_graph_of_one_batch_size_shows_where_its_images_are() -> None:
    """Nothing but what changes with an image tells which of two axes of length 2 is that of the images."""
    module = Ends(lambda net, x: net.mapped(x)[:, :2].amax((2, 3)).t().squeeze()).eval()
    network = capture(torch.export.export(module, (torch.zeros(2, *SHAPE),)))

    assert network.batch == 2
    assert [output.axis for output in network.outputs] == [1]


def test_rows_of_one_image_are_kept_together() -> None:
    network = found(lambda net, x: net.steps(x).flatten(0, 1))
    images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))

    (output,) = network.outputs
    assert output.shape == (12, 10)
    assert network(images).shape == (3, 12, 10)


def test_what_does_not_depend_on_the_images_is_the_same_for_each() -> None:
    network = found(lambda net, x: (net.pooled(x), net.head.weight * 2), compete=True)

    assert [output.axis for output in network.outputs] == [0, None]
    assert "does not depend on the images" in str(network.outputs[1])
    assert [tuple(value.shape) for value in network.answers(torch.zeros(3, *SHAPE))] == [(3, 10), (3, 10, 16)]


def test_what_is_no_tensor_is_left_out_and_said() -> None:
    network = found(lambda net, x: (None, net.pooled(x), 7, x.shape[0], x.mean()))

    assert [output.shape for output in network.outputs] == [(10,)]
    left = ((0, None), (2, 7), (3, "one number"), (4, "one number"))
    assert network.remarks == tuple(f"output {place} is {what}, no answer to each image, and left out" for place, what in left)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (lambda net, x: (net.pooled(x), x), "'output_1' is the input itself"),
        (lambda *_: None, "returns no tensor of answers"),
        (lambda net, x: net.pooled(x).mean(0), "has no axis of theirs"),
    ],
)
def test_what_is_no_answer_is_refused_in_one_line(ends: Callable[[Ends, Tensor], object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        found(ends)
    assert "\n" not in str(caught.value)


# ---- stated


@pytest.mark.parametrize(
    ("ends", "kind", "form"),
    [
        (Ends.pooled, "values", ""),
        (Ends.pooled, "features", ""),
        (Ends.pooled, "multilabel", "logits"),
        (Ends.pooled, "classes", "logits"),
        (lambda net, x: net.pooled(x).sigmoid(), "classes", "sigmoid"),
        (Ends.mapped, "dense-classes", "logits"),
        (Ends.mapped, "dense", "logits"),
        (Ends.steps, "sequence classes", "logits"),
        (boxes, "regions", "sigmoid"),
    ],
)
def test_a_kind_is_stated(ends: Callable[[Ends, Tensor], object], kind: str, form: str) -> None:
    network = load(Ends(ends).eval(), input_shape=SHAPE, outputs={"output": kind})
    (output,) = network.outputs

    assert output.kind in KINDS
    assert output.kind.startswith(kind.split("-")[0])
    assert (output.known, output.form) == ("stated", form)
    assert str(output).endswith(f"{output.kind}, as stated")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"scores": "classes"}, r"unknown output 'scores' \(known: output\)"),
        ({"output": "klasses"}, "unknown kind of output 'klasses'; did you mean 'classes'"),
        ({"output": "dense classes"}, r"\(N, 10\) and cannot be dense classes"),
        ({"output": "sequence"}, r"\(N, 10\) and cannot be sequence classes"),
        ({"output": "regions"}, r"\(N, 10\) and cannot be regions"),
    ],
)
def test_what_cannot_be_is_refused(stated: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(Ends(Ends.pooled).eval(), input_shape=SHAPE, outputs=stated)


def test_regions_without_scores_are_refused() -> None:
    with pytest.raises(OptionError, match="found by the sigmoid or softmax"):
        load(Ends(Ends.steps).eval(), input_shape=SHAPE, outputs={"output": "regions"})
