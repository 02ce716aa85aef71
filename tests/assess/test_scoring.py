"""What answers are worth by labels of every form, against counting by hand."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamquant.assess import scoring
from dreamquant.assess.evaluate import Runnable, judge, runnable
from dreamquant.assess.labelled import load_labelled, placed, resized
from dreamquant.assess.scoring import edits, score_of, told_of
from dreamquant.assess.truths import BOXES, CLASS, LISTS, MASKS, NUMBERS, TrueBoxes
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network import output_properties
from dreamquant.network.outputs import CLASSES, DENSE, FEATURES, GRAPH, MULTILABEL, REGIONS, SEQUENCE, SHAPE, VALUES, Output

SIZE = (4, 4)


def output(kind: str, *shape: int, known: str = GRAPH, **more: Any) -> Output:
    return Output("y", kind, known, "the graph", 0, shape, **more)


def scored(
    answered: Output, answers: Any, truth: Sequence[Any], *, size: tuple[int, int] = SIZE, **more: Any
) -> dict[str, float]:
    """Figures of answers that come in two batches."""
    score = score_of(answered, size, more.pop("resize", "stretch"), truth, **more)
    for part in (slice(0, 1), slice(1, None)):
        score.add(torch.as_tensor(answers)[part], truth[part])
    return score.result()


def mask(*rows: Sequence[int]) -> Any:
    return lambda: Image.fromarray(np.array(rows, np.uint8))


# ---- by hand


def test_first_classes() -> None:
    answers = torch.eye(7)[[0, 1, 2, 3]]
    assert scored(output(CLASSES, 7), answers, [0, 1, 3, 6]) == {"top-1": 50.0, "top-5": 75.0}


@pytest.mark.parametrize(("form", "scale"), [("sigmoid", 1.0), ("logits", 4.0)])
def test_labels(form: str, scale: float) -> None:
    answers = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.2, 0.3]])
    given = answers if form == "sigmoid" else scale * (answers - 0.5)
    assert scored(output(MULTILABEL, 3, form=form), given, [[0, 1], []]) == {"F1": 50.0}  # one of two found, one of two true


def test_pixels() -> None:
    found = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [0, 0]]])
    answers = torch.nn.functional.one_hot(found, 4).movedim(3, 1).float()
    truth = [mask((0, 0), (1, 0)), mask((255, 2), (0, 0))]
    # class 0: 4 of 5, class 1: 1 of 2, class 2: 1 of 1, and class 3 is nowhere
    figures = scored(output(DENSE, 4, 2, 2), answers, truth, size=(2, 2))
    assert figures == pytest.approx({"mean IoU": 100 * (0.8 + 0.5 + 1) / 3, "pixels": 100 * 6 / 7})


def test_maps_of_another_size_than_the_image() -> None:
    answers = torch.tensor([[[[1.0, -1.0]]], [[[1.0, 1.0]]]])
    truth = [mask((1, 1, 0, 0), (1, 1, 0, 0)), mask((1, 1, 1, 1), (1, 1, 1, 1))]
    assert scored(output(DENSE, 1, 1, 2), answers, truth, size=(4, 2))["mean IoU"] == 100


def test_neighbours() -> None:
    answers = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.7, 0.7]])
    assert scored(output(FEATURES, 2), answers, [0, 0, 1, 1, 2]) == {"nearest neighbour": 80.0}


@pytest.mark.parametrize("axis", [1, 2])
def test_readings(axis: int) -> None:
    lines = torch.tensor([[1, 1, 0, 1, 2], [0, 2, 2, 0, 0]])
    answers = torch.nn.functional.one_hot(lines, 4).float().movedim(2, axis)
    shape = (4, 5) if axis == 1 else (5, 4)
    truth = [[1, 1, 2], [2, 3]]
    figures = scored(output(SEQUENCE, *shape, places=axis), answers, truth, blank=0)
    assert figures == {"read": 50.0, "errors a class": 20.0}
    assert scored(output(SEQUENCE, *shape, places=axis), answers, truth) == figures  # 3 is a label and 0 is none


def test_the_blank_is_told_where_labels_leave_it_open() -> None:
    answered = output(SEQUENCE, 5, 4, places=2)
    for labels, why in (([1, 2], "neither is a label"), ([0, 3], "both are labels")):
        with pytest.raises(OptionError, match=f"of the classes 0 and 3 {why}.*give --blank"):
            score_of(answered, SIZE, "cover", [labels])
    with pytest.raises(OptionError, match="the blank is 4, and y tells 4 classes, 0 to 3"):
        score_of(answered, SIZE, "cover", [[1]], blank=4)
    with pytest.raises(OptionError, match="a blank is of sequences, and y is multilabel"):
        score_of(output(MULTILABEL, 3), SIZE, "cover", [[1]], blank=0)


def test_edits() -> None:
    assert [edits("kitten", "sitting"), edits("", "abc"), edits("abc", "abc"), edits("flaw", "lawn")] == [3, 3, 0, 2]  # type: ignore[arg-type]


def test_errors() -> None:
    answers = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert scored(output(VALUES, 2), answers, [np.array([1.0, 1.0]), np.array([0.0, 4.0])]) == {"mean absolute error": 1.0}


def test_boxes() -> None:
    pytest.importorskip("pycocotools")
    answered = output(REGIONS, 3, 6, places=2, scores=(4, 5), form="sigmoid")
    answers = torch.tensor(
        [
            [[10.0, 20, 4, 8, 0.9, 0.1], [11.0, 20, 4, 8, 0.8, 0.1], [30.0, 30, 4, 4, 0.0, 0.7]],  # the second is the first again
            [[10.0, 10, 4, 4, 0.2, 0.9], [0.0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0]],
        ]
    )
    one = [{"category_id": 7, "bbox": [16.0, 32.0, 8.0, 16.0]}, {"category_id": 9, "bbox": [56.0, 56.0, 8.0, 8.0]}]
    other = [{"category_id": 7, "bbox": [16.0, 16.0, 8.0, 8.0]}]  # found as the wrong category
    truth = [TrueBoxes(boxes, (80, 80), (7, 9)) for boxes in (one, other)]
    figures = scored(answered, answers, truth, size=(40, 40))
    # category 9: its box is the second surest of two, so half; category 7: one of two, the surest
    assert figures["mAP at IoU 0.5"] == pytest.approx(100 * (0.5 + 51 / 101) / 2, abs=1e-4)
    assert scored(answered, torch.zeros(2, 3, 6), truth, size=(40, 40)) == {"mAP": 0.0, "mAP at IoU 0.5": 0.0}


@pytest.mark.parametrize("resize", ["cover", "letterbox", "stretch", "30"])
def test_where_a_pixel_comes_to_lie(resize: str) -> None:
    image = Image.new("L", (60, 40))
    image.paste(255, (20, 8, 40, 24))
    small = np.asarray(resized(image, 24, 24, resize)) > 200
    scale, shift = placed(image.size, (24, 24), resize)
    for axis, (low, high) in enumerate(((20, 40), (8, 24))):
        there = np.flatnonzero(small.any(axis))
        bounds = [low * scale[axis] + shift[axis], high * scale[axis] + shift[axis]]
        assert np.abs(np.clip(bounds, 0, 24) - (there[0], there[-1] + 1)).max() <= 1.5


def test_labels_that_do_not_fit() -> None:
    for answered, truth in (
        (output(MULTILABEL, 3), [[3]]),
        (output(SEQUENCE, 4, 3, places=2), [[1, 2, 3]]),
        (output(DENSE, 3, 1, 1), [mask((3,))]),
    ):
        with pytest.raises(DataError, match="the labels go up to 3, and y tells 3 classes"):
            score_of(answered, (1, 1), "stretch", truth).add(torch.zeros(1, *answered.shape), truth)
    with pytest.raises(DataError, match="there are 3 numbers for an image, and y tells 2"):
        score_of(output(VALUES, 2), SIZE, "cover", []).add(torch.zeros(1, 2), [np.zeros(3)])
    with pytest.raises(DataError, match="there is one image"):
        scored(output(FEATURES, 2), torch.ones(1, 2), [0])


def test_boxes_need_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(OptionError, match=r"no module pycocotools.coco.*pip install 'dreamquant\[coco\]'"):
        score_of(output(REGIONS, 3, 6, places=2, scores=(4, 5)), SIZE, "cover", [])


# ---- which output is told of


def test_labels_tell_of_the_output_that_they_fit() -> None:
    known = [output(VALUES, 2), output(CLASSES, 10), output(FEATURES, 8)]
    assert told_of(known, CLASS, "m")[0] == 1
    assert told_of(known, NUMBERS, "m")[0] == 0
    assert told_of([output(FEATURES, 8)], CLASS, "m")[1].kind == FEATURES
    guessed = [output(CLASSES, 10, known=SHAPE), output(SEQUENCE, 5, 10, known=SHAPE), output(VALUES, 10, 4, 4, known=SHAPE)]
    assert [told_of(guessed, form, "m")[1].kind for form in (LISTS, MASKS, NUMBERS)] == [SEQUENCE, DENSE, VALUES]
    assert told_of(guessed[:1], LISTS, "m")[1].kind == MULTILABEL
    with pytest.raises(DataError, match="the labels are boxes, and m has no output of regions \\(it has: y: classes"):
        told_of(guessed, BOXES, "m")


def test_what_a_file_says_of_its_outputs() -> None:
    outputs = (output(CLASSES, 10), Output("boxes", REGIONS, GRAPH, "why", 0, (5, 7), "sigmoid", 2, (4, 5, 6), True))
    stored = output_properties.properties(outputs)
    assert output_properties.of_properties(stored, ["y", "boxes"]) == outputs
    assert output_properties.of_properties(stored, ["boxes", "y"]) is None
    assert output_properties.of_properties({}, ["y"]) is None
    whole = json.loads(stored[output_properties.KEY])
    for broken in ("[", "[1]", "7", "[" * 100_000, *(json.dumps([whole[1] | change]) for change in BROKEN)):
        with pytest.raises(ModelError, match="the property dreamquant.outputs is no list of outputs"):
            output_properties.of_properties({output_properties.KEY: broken}, ["boxes"])


BROKEN: list[dict[str, Any]] = [{"kind": "cats"}, {"places": 9}, {"scores": [7]}, {"shape": [-1]}, {"axis": "0"}, {"more": 1}]


# ---- labels in files


def images_in(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 2), 40 * number).save(folder / name)
    return folder


def test_lists_of_classes_in_a_csv(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images", "a.png", "b.png", "c.png")
    (tmp_path / "labels.csv").write_text("file,label\nb.png,3 5 3\na.png,2\nc.png,\n")
    data = load_labelled(folder, labels=tmp_path / "labels.csv")
    assert data.truths is not None
    assert (data.truths.form, data.truths.each) == (LISTS, [[3, 5, 3], [2], []])
    assert data.labels.tolist() == [-1, -1, -1]
    assert data.chosen([1, 0]).truths == data.truths.chosen([1, 0])


def test_masks_in_a_folder(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images", "a.jpg", "below/b.png")
    for name in ("a", "below/b"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        palette = Image.fromarray(np.array([[0, 1, 2, 255]] * 2, np.uint8)).convert("P")
        palette.putpalette([7] * 768)
        palette.save(tmp_path / "masks" / f"{name}.png")
    data = load_labelled(folder, labels=tmp_path / "masks")
    assert data.truths is not None
    assert data.truths.form == MASKS
    assert [np.asarray(one()).tolist() for one in data.truths.each] == [[[0, 1, 2, 255]] * 2] * 2
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(DataError, match="1 of the 2 images have no mask, the first should be .*a.png"):
        load_labelled(folder, labels=tmp_path / "masks")
    Image.new("RGB", (4, 2)).save(tmp_path / "masks" / "a.png")
    again = load_labelled(folder, labels=tmp_path / "masks").truths
    assert again is not None
    with pytest.raises(DataError, match="is no mask: its pixels are RGB"):
        again.each[0]()


COCO: dict[str, Any] = {
    "images": [{"id": 5, "file_name": "a.png", "width": 4, "height": 2}],
    "annotations": [{"image_id": 5, "category_id": 3, "bbox": [1, 0, 2, 2]}],
    "categories": [{"id": 3}, {"id": 1}],
}


def test_boxes_in_a_json(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "boxes.json").write_text(json.dumps(COCO))
    data = load_labelled(folder, labels=tmp_path / "boxes.json")
    assert data.truths is not None
    (true,) = data.truths.each
    assert (data.truths.form, true.size, true.categories) == (BOXES, (4, 2), (1, 3))
    assert [one["bbox"] for one in true.annotations] == [[1, 0, 2, 2]]


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        "[" * 100_000,
        json.dumps(COCO | {"images": []}),
        json.dumps(COCO | {"categories": [{"id": 1}]}),
        json.dumps(COCO | {"images": [{"id": 5, "file_name": "a.png", "width": 0, "height": 2}]}),
        json.dumps(COCO | {"annotations": [{"image_id": 6, "category_id": 3, "bbox": [1, 0, 2, 2]}]}),
        json.dumps(COCO | {"annotations": [{"image_id": 5, "category_id": 3, "bbox": [1, 0, 2, float("nan")]}]}),
    ],
)
def test_boxes_in_a_broken_json(tmp_path: Path, broken: str) -> None:
    folder = images_in(tmp_path / "images", "a.png")
    (tmp_path / "boxes.json").write_text(broken)
    with pytest.raises(DataError, match=r"boxes.json"):
        load_labelled(folder, labels=tmp_path / "boxes.json")


@pytest.mark.parametrize(
    ("labels", "form", "first"),
    [
        (np.array([[1, 0, 1], [0, 0, 0]], bool), LISTS, [0, 2]),
        (np.array([[4, 4, -1], [2, -1, -1]]), LISTS, [4, 4]),
        (np.array([[0.5, 1.5], [2.0, 3.0]], np.float32), NUMBERS, [0.5, 1.5]),
    ],
)
def test_labels_in_an_npz(tmp_path: Path, labels: Any, form: str, first: list[float]) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4, 4), np.uint8), y=labels)
    truths = load_labelled(tmp_path / "d.npz").truths
    assert truths is not None
    assert (truths.form, list(truths.each[0])) == (form, first)


# ---- a whole network


def answering(answers: Tensor, answered: Output) -> Runnable:
    """A network that looks the answer to image i up: its pixel is i."""
    return Runnable("m", lambda images: [answers[np.rint(images[:, 0, 0, 0] * 255)]], (answered,), (1, 1, 1), (0.0,), (1.0,))


def test_a_network_is_judged_batch_by_batch(tmp_path: Path) -> None:
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)
    labels = np.arange(5)[:, None] == np.arange(3)
    np.savez(tmp_path / "d.npz", x=pixels, y=labels)
    answers = torch.eye(5)[:, :3]
    heard: list[tuple[int, int]] = []
    found = judge(
        answering(answers, output(MULTILABEL, 3, form="sigmoid")),
        load_labelled(tmp_path / "d.npz"),
        batch=2,
        callback=lambda *done: heard.append(done),
    )
    assert (found.output, found.kind, found.figures, found.images) == ("y", MULTILABEL, {"F1": 100.0}, 5)
    assert heard == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(ModelError, match="m gives numbers that are NaN or infinite"):
        judge(answering(answers * torch.nan, output(MULTILABEL, 3)), load_labelled(tmp_path / "d.npz"))


def test_features_are_told_by_their_neighbours(tmp_path: Path) -> None:
    class Embed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.normalize(x.flatten(1) + 0.1, dim=1)

    program = torch.export.export(Embed(), (torch.rand(2, 1, 2, 2),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    torch.export.save(program, tmp_path / "net.pt2")
    pixels = np.array([[[250, 0], [0, 0]], [[240, 10], [0, 0]], [[0, 0], [0, 250]], [[0, 0], [9, 240]]], np.uint8)
    np.savez(tmp_path / "d.npz", x=pixels, y=np.array([0, 0, 1, 1]))
    subject = runnable(str(tmp_path / "net.pt2"), mean=(0.0,), std=(1.0,))
    found = judge(subject, load_labelled(tmp_path / "d.npz"))
    assert (found.kind, found.figures) == (FEATURES, {"nearest neighbour": 100.0})


def test_every_form_of_labels_and_every_kind_has_its_score() -> None:
    assert set(scoring.SUITED) == {CLASS, LISTS, MASKS, BOXES, NUMBERS}
    assert {kind for kinds in scoring.SUITED.values() for kind in kinds} == {*scoring.SCORES, SEQUENCE}
