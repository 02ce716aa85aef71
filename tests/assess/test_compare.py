"""Two files against each other: what is told against numbers worked out by hand, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_static
from PIL import Image

import dreamquant
from dreamquant.assess.compare import compare
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.assess.paired import paired_interval
from dreamquant.calibration import CalibrationReader
from dreamquant.errors import DataError, DreamQuantError, ModelError, OptionError
from dreamquant.samples import Samples

SHAPE = (1, 3, 4)
FOLDED = "digits_bnfolded.onnx"
QUICK: dict[str, Any] = {"rounds": 1}
node = helper.make_node
Array = NDArray[Any]


def weights(classes: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((12, classes), dtype=np.float32)


ONE, BOXES = weights(7, 1), weights(6, 2)
OTHER, OTHER_BOXES = ONE + 0.1 * weights(7, 3), BOXES + 0.1 * weights(6, 4)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    outputs: dict[str, tuple[int | str, ...] | None],
    *,
    shape: tuple[int | str, ...] = ("n", *SHAPE),
    metadata: dict[str, str] | None = None,
    **stored: Array,
) -> Path:
    """A file that takes images `x`."""
    kinds = {"kept": TensorProto.INT64, "first": TensorProto.INT64, "text": TensorProto.STRING}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), sizes) for name, sizes in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def linear(path: Path, matrix: Array, *, name: str = "scores", softmax: bool = False, **options: Any) -> Path:
    """Images times a matrix."""
    nodes = [node("Flatten", ["x"], ["flat"]), node("MatMul", ["flat", "matrix"], ["product" if softmax else name])]
    if softmax:
        nodes.append(node("Softmax", ["product"], [name]))
    return save(path, nodes, {name: None}, matrix=matrix, **options)


def two_headed(
    path: Path, scores: Array, boxes: Array, *, batch: int | str = "n", names: tuple[str, str] = ("scores", "boxes")
) -> Path:
    """Images times two matrices; the second product is three boxes of two numbers."""
    nodes = [
        node("Flatten", ["x"], ["flat"]),
        node("MatMul", ["flat", "one"], [names[0]]),
        node("MatMul", ["flat", "other"], ["long"]),
        node("Reshape", ["long", "sizes"], [names[1]]),
    ]
    outputs: dict[str, Any] = {names[0]: (batch, scores.shape[1]), names[1]: (batch, 3, 2)}
    sizes = np.array([-1, 3, 2])
    return save(path, nodes, outputs, shape=(batch, *SHAPE), one=scores, other=boxes, sizes=sizes)


def noise(count: int, shape: tuple[int, ...] = SHAPE) -> Samples:
    return Samples(torch.from_numpy(np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)))


def flat(samples: Samples) -> Array:
    return samples.images.numpy().reshape(len(samples), -1).astype(np.float64)


def probabilities(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def divergence(one: Array, other: Array) -> float:
    return float((one * np.log(one / other)).sum(1).mean())


def pixels(path: Path, labels: list[int]) -> LabelledImages:
    """Labelled noise of the size of `SHAPE`."""
    x = np.random.default_rng(5).integers(0, 256, (len(labels), *SHAPE[1:]), dtype=np.uint8)
    np.savez(path, x=x, y=np.array(labels))
    return load_labelled(path)


def seen(data: LabelledImages, mean: float = 0.5, std: float = 0.25) -> Array:
    ((images, _),) = data.batches(len(data), input_shape=SHAPE, mean=(mean,), std=(std,))
    return images.reshape(len(data), -1).astype(np.float64)


GREY: dict[str, Any] = {"mean": (0.5,), "std": (0.25,)}


# ---- outputs


def test_errors_of_every_output_are_those_of_numpy(tmp_path: Path) -> None:
    a, b = two_headed(tmp_path / "a.onnx", ONE, BOXES), two_headed(tmp_path / "b.onnx", OTHER, OTHER_BOXES)
    samples = noise(70)
    found = compare(a, b, samples=samples, **QUICK)
    assert (found.count, found.matched, found.notes) == (70, "name", [])
    for output, one, other in zip(found.outputs, (ONE, BOXES), (OTHER, OTHER_BOXES), strict=True):
        x, y = flat(samples) @ one, flat(samples) @ other
        assert output.relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
        assert output.sqnr == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=1e-3)
        assert output.largest == pytest.approx(np.abs(x - y).max(), rel=1e-4)
        assert output.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
    scores, boxes = found.outputs
    x, y = flat(samples) @ ONE, flat(samples) @ OTHER
    assert (scores.name, scores.name_b, scores.shape) == ("scores", "scores", (None, 7))
    assert scores.top1 == 100 * (x.argmax(1) == y.argmax(1)).mean()
    assert 80 < scores.top1 < 100
    assert scores.kl == pytest.approx(divergence(probabilities(x), probabilities(y)), rel=1e-4)
    assert (boxes.shape, boxes.top1, boxes.kl) == ((None, 3, 2), None, None)


def test_a_file_and_itself(tmp_path: Path) -> None:
    path = two_headed(tmp_path / "a.onnx", ONE, BOXES)
    found = compare(path, path, samples=noise(5), **QUICK)
    assert found.size_ratio == 1
    assert found.a == found.b
    for output in found.outputs:
        assert (output.relative_l2, output.sqnr, output.largest, output.cosine) == (0, None, 0, 1)
    assert (found.outputs[0].top1, found.outputs[0].kl) == (100, 0)
    assert json.loads(json.dumps(asdict(found)))["outputs"][0]["shape"] == [None, 7]


def test_nothing_is_relative_to_zero(tmp_path: Path) -> None:
    zero, path = linear(tmp_path / "zero.onnx", 0 * ONE), linear(tmp_path / "a.onnx", ONE)
    (output,) = compare(zero, path, samples=noise(5), **QUICK).outputs
    assert (output.relative_l2, output.sqnr, output.cosine) == (None, None, None)
    assert output.largest > 1
    (output,) = compare(zero, zero, samples=noise(5), **QUICK).outputs
    assert (output.relative_l2, output.sqnr, output.cosine) == (0, None, None)


@pytest.mark.parametrize(("softmax_a", "softmax_b"), [(True, True), (True, False), (False, True)])
def test_the_divergence_is_of_probabilities_wherever_the_softmax_is(softmax_a: bool, softmax_b: bool, tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", ONE, softmax=softmax_a)
    b = linear(tmp_path / "b.onnx", OTHER, softmax=softmax_b)
    x, y = probabilities(flat(noise(20)) @ ONE), probabilities(flat(noise(20)) @ OTHER)
    (output,) = compare(a, b, samples=noise(20), **QUICK).outputs
    assert output.kl == pytest.approx(divergence(x, y), rel=1e-3)


def test_a_probability_of_zero_is_a_small_one(tmp_path: Path) -> None:
    a, b = linear(tmp_path / "a.onnx", ONE, softmax=True), linear(tmp_path / "b.onnx", -100 * ONE, softmax=True)
    samples = noise(8)
    x, y = probabilities(flat(samples) @ ONE), probabilities(-100 * flat(samples) @ ONE)
    assert y.min() == 0
    lifted = np.maximum(y, 1e-7)
    expected = divergence(x, lifted / lifted.sum(1, keepdims=True))
    assert compare(a, b, samples=samples, **QUICK).outputs[0].kl == pytest.approx(expected, rel=1e-4)


def test_among_equal_scores_the_first_counts(tmp_path: Path) -> None:
    tied, raised = np.ones((2, 12, 4), np.float32)
    images = Samples(torch.ones(3, *SHAPE))
    for place, same in ((0, 100), (3, 0)):
        raised[:, place] = 2
        a, b = linear(tmp_path / "a.onnx", tied), linear(tmp_path / "b.onnx", raised)
        assert compare(a, b, samples=images, outputs={"scores": "classes"}, **QUICK).outputs[0].top1 == same
        raised[:, place] = 1


def test_outputs_that_are_no_scores(tmp_path: Path) -> None:
    """A class number, one number for the whole batch, one number an image, and several whole numbers an image."""
    nodes = [
        node("Flatten", ["x"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["product"]),
        node("ArgMax", ["product"], ["first"], axis=1),
        node("ReduceMean", ["product"], ["mean"], keepdims=0),
        node("ReduceMax", ["product"], ["best"], axes=[1]),
        node("TopK", ["product", "two"], ["two best", "kept"]),
    ]
    outputs = {"first": None, "mean": None, "best": None, "kept": None}
    two = np.array([2])
    a, b = (save(tmp_path / f"{i}.onnx", nodes, outputs, matrix=matrix, two=two) for i, matrix in enumerate((ONE, OTHER)))
    samples = noise(6)
    first, mean, best, kept = compare(a, b, samples=samples, **QUICK).outputs
    x, y = flat(samples) @ ONE, flat(samples) @ OTHER
    assert [output.top1 for output in (first, mean, best, kept)] == [None] * 4
    assert first.largest == np.abs(x.argmax(1) - y.argmax(1)).max()
    assert mean.largest == pytest.approx(abs(x.mean() - y.mean()), abs=1e-5)
    assert best.largest == pytest.approx(np.abs(x.max(1) - y.max(1)).max(), rel=1e-4)
    assert (first.shape, mean.shape, best.shape, kept.shape) == ((None, 1), (1,), (None, 1), (None, 2))


@pytest.mark.parametrize(
    ("batch_a", "batch_b", "timed"), [("n", "n", 1), (1, "n", 1), (4, "n", 4), ("n", 3, 3), (4, 4, 4), (4, 2, None), (1, 4, None)]
)
def test_files_of_every_batch_size(batch_a: int | str, batch_b: int | str, timed: int | None, tmp_path: Path) -> None:
    samples = noise(7)
    a = two_headed(tmp_path / "a.onnx", ONE, BOXES, batch=batch_a)
    b = two_headed(tmp_path / "b.onnx", OTHER, OTHER_BOXES, batch=batch_b)
    found = compare(a, b, samples=samples, **QUICK)
    x, y = flat(samples) @ BOXES, flat(samples) @ OTHER_BOXES
    assert found.outputs[1].relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
    assert found.outputs[1].shape == (None, 3, 2)
    assert found.count == 7
    assert (None if found.latency is None else found.latency.batch) == timed
    assert ("no batch of one size can be timed" in " ".join(found.notes)) == (timed is None)


def test_both_files_are_run_on_the_same_batches(tmp_path: Path) -> None:
    """An output that is of a whole batch differs between batches of other sizes, filled up or not."""
    nodes = [node("ReduceMean", ["x"], ["mean"], keepdims=0)]
    a = save(tmp_path / "a.onnx", nodes, {"mean": None})
    b = save(tmp_path / "b.onnx", nodes, {"mean": None}, shape=(4, *SHAPE))
    for one, other in ((a, b), (b, a)):
        assert compare(one, other, samples=noise(7), **QUICK).outputs[0].largest < 1e-6


def test_what_latency_was_measured_with(tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", ONE)
    latency = compare(path, path, samples=noise(2), batch=3, threads=2, rounds=2).latency
    assert latency is not None
    assert (latency.batch, latency.threads, latency.rounds) == (3, 2, 2)
    assert latency.ratio_low <= latency.ratio <= latency.ratio_high


def test_progress_is_heard(tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", ONE)
    heard: list[tuple[int, int]] = []
    compare(path, path, samples=noise(70), callback=lambda *step: heard.append(step), **QUICK)
    assert heard == [(32, 70), (64, 70), (70, 70)]


# ---- which outputs belong together, and files that do not


def test_outputs_of_other_names_are_matched_by_order(tmp_path: Path) -> None:
    a = two_headed(tmp_path / "a.onnx", ONE, BOXES)
    b = two_headed(tmp_path / "b.onnx", ONE, BOXES, names=("logits", "places"))
    found = compare(a, b, samples=noise(3), **QUICK)
    assert found.matched == "order"
    assert [(output.name, output.name_b) for output in found.outputs] == [("scores", "logits"), ("boxes", "places")]
    assert "scores with logits, boxes with places" in found.notes[0]
    assert all(output.relative_l2 < 1e-6 for output in found.outputs if output.relative_l2 is not None)


def test_outputs_of_the_same_names_are_matched_by_name(tmp_path: Path) -> None:
    a = two_headed(tmp_path / "a.onnx", ONE, BOXES)
    model = onnx.load(a)
    turned = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(turned)
    onnx.save(model, tmp_path / "b.onnx")
    found = compare(a, tmp_path / "b.onnx", samples=noise(3), **QUICK)
    assert (found.matched, [output.name for output in found.outputs]) == ("name", ["scores", "boxes"])
    assert [output.largest for output in found.outputs] == [0, 0]


def test_files_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path) -> None:
    a, heads = linear(tmp_path / "a.onnx", ONE), two_headed(tmp_path / "heads.onnx", ONE, BOXES)
    short = linear(tmp_path / "short.onnx", ONE[:, :5])
    wide = linear(tmp_path / "wide.onnx", weights(7, 0), shape=("n", 1, 4, 3))
    for other, message in {
        short: r"do not fit each other: .*a\.onnx gives scores \(.*7\), and .*short\.onnx gives scores \(.*5\)",
        heads: r"scores \(.*7\), and .*heads\.onnx gives scores \(n, 7\), boxes \(n, 3, 2\)",
        wide: r"a\.onnx takes images \(1, 3, 4\), and .*wide\.onnx \(1, 4, 3\): they cannot be compared",
    }.items():
        with pytest.raises(ModelError, match=message):
            compare(a, other, samples=noise(2), **QUICK)


def test_shapes_that_depend_on_the_images(tmp_path: Path) -> None:
    nodes = [node("Sub", ["x", "level"], ["rest"]), node("Relu", ["rest"], ["above"]), node("NonZero", ["above"], ["kept"])]
    a, b = (save(tmp_path / f"{level}.onnx", nodes, {"kept": (4, "k")}, level=np.full((), level, np.float32)) for level in (0, 1))
    images = noise(4)
    above = [int((images.images > level).sum()) for level in (0, 1)]
    with pytest.raises(ModelError, match=rf"same 4 images .*kept \(4, {above[0]}\) and .*kept \(4, {above[1]}\): they cannot"):
        compare(a, b, samples=images, **QUICK)
    assert compare(a, a, samples=images, **QUICK).outputs[0].largest == 0


def test_outputs_that_are_no_numbers(tmp_path: Path) -> None:
    a, b = linear(tmp_path / "a.onnx", ONE), linear(tmp_path / "b.onnx", ONE * np.float32("nan"))
    with pytest.raises(ModelError, match=r"35 of the 35 values that .*b\.onnx gives as scores are NaN or infinite"):
        compare(a, b, samples=noise(5), **QUICK)
    words = save(tmp_path / "words.onnx", [node("Cast", ["x"], ["text"], to=TensorProto.STRING)], {"text": None})
    with pytest.raises(ModelError, match=r"gives tensor\(string\) as text, which is no tensor of numbers"):
        compare(words, words, samples=noise(5), **QUICK)


def test_sizes_that_files_leave_open(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", ["x"], ["pooled"])]
    path = save(tmp_path / "open.onnx", nodes, {"pooled": ("n", 1, 1, 1)}, shape=("n", 1, "h", "w"))
    fixed = save(tmp_path / "fixed.onnx", nodes, {"pooled": ("n", 1, 1, 1)}, shape=("n", 1, 5, "w"))
    assert compare(path, path, samples=noise(2), **QUICK).count == 2
    assert compare(path, path, input_shape=(1, 5, 6), count=3, **QUICK).count == 3
    with pytest.raises(OptionError, match=r"leave the size of their images open: give --input-shape"):
        compare(path, path, **QUICK)
    with pytest.raises(DataError, match=r"the samples are \(1, 3, 4\), and .* take images \(1, 5, \?\)"):
        compare(path, fixed, samples=noise(2), **QUICK)
    with pytest.raises(DataError, match=r"input shape that was given is \(1, 6, 6\), and .* take images \(1, 5, \?\)"):
        compare(fixed, path, input_shape=(1, 6, 6), **QUICK)


# ---- images


def test_procedural_images_are_those_of_the_network_and_said_to_be(digits: Path, tmp_path: Path) -> None:
    a = digits / FOLDED
    model = onnx.load(a)
    last = max((t for t in model.graph.initializer if len(t.dims) == 2), key=lambda t: t.dims[0])
    last.CopyFrom(numpy_helper.from_array(1.25 * numpy_helper.to_array(last), last.name))
    onnx.save(model, tmp_path / "b.onnx")
    found = compare(a, tmp_path / "b.onnx", count=5, seed=3, **QUICK)
    assert found.images == "5 procedural images (dead leaves under 1/f texture, seed 3)"
    assert "neither samples nor data were given" in found.notes[0]
    assert len(found.notes) == 1
    samples = dreamquant.synthesize(dreamquant.load(a), 5, method="fractal", seed=3)
    same = compare(a, tmp_path / "b.onnx", samples=samples, **QUICK)
    assert same.images == "5 samples by fractal, seed 3"
    assert same.outputs == found.outputs
    assert found.outputs != compare(a, tmp_path / "b.onnx", count=5, seed=4, **QUICK).outputs


def test_procedural_images_without_normalisation(tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", ONE)
    assert "mean 0 and deviation 1" in compare(path, path, count=4, **QUICK).notes[1]
    assert len(compare(path, path, count=4, **GREY, **QUICK).notes) == 1


def test_normalisation_is_given_or_stored_in_either_file(tmp_path: Path) -> None:
    stored = {"dreamquant.mean": "0.5", "dreamquant.std": "0.25"}
    a, plain = linear(tmp_path / "a.onnx", ONE, metadata=stored), linear(tmp_path / "plain.onnx", OTHER)
    odd = linear(tmp_path / "odd.onnx", OTHER, metadata=stored | {"dreamquant.std": "0.75"})
    data = pixels(tmp_path / "d.npz", [0] * 9)
    x, y = seen(data) @ ONE, seen(data) @ OTHER
    for one, other, options in ((a, plain, {}), (a, odd, GREY)):
        found = compare(one, other, data=data, **options, **QUICK).outputs[0].relative_l2
        assert found == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
    assert compare(plain, a, data=data, **QUICK).outputs[0].relative_l2 == pytest.approx(
        np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-4
    )
    with pytest.raises(OptionError, match=r"a\.onnx stores mean and std 0\.5 and 0\.25, and .*odd\.onnx 0\.5 and 0\.75: say"):
        compare(a, odd, data=data, **QUICK)
    with pytest.raises(OptionError, match=r"neither .*plain\.onnx nor .*plain\.onnx stores how pixels are normalised"):
        compare(plain, plain, data=data, **QUICK)
    with pytest.raises(OptionError, match="mean and std belong together"):
        compare(a, a, mean=(0.5,), **QUICK)
    compare(a, odd, samples=noise(2), **QUICK)  # these are normalised already


# ---- labels


def test_accuracy_is_counted_image_by_image(tmp_path: Path) -> None:
    a, b = two_headed(tmp_path / "a.onnx", BOXES, ONE[:, :6]), two_headed(tmp_path / "b.onnx", OTHER_BOXES, ONE[:, :6])
    data = pixels(tmp_path / "d.npz", (np.arange(75) % 6).tolist())
    x, y = seen(data) @ BOXES, seen(data) @ OTHER_BOXES
    data = pixels(tmp_path / "d.npz", [(image if i % 3 else i) % 6 for i, image in enumerate(x.argmax(1).tolist())])
    found = compare(a, b, data=data, **GREY, **QUICK)
    accuracy = found.accuracy
    assert accuracy is not None
    right_a, right_b = x.argmax(1) == data.labels, y.argmax(1) == data.labels
    assert (accuracy.a_top1, accuracy.b_top1) == (100 * right_a.mean(), 100 * right_b.mean())
    for scores, top5 in ((x, accuracy.a_top5), (y, accuracy.b_top5)):
        assert top5 == pytest.approx(100 * (np.argsort(-scores, 1)[:, :5] == data.labels[:, None]).any(1).mean())
    assert (accuracy.only_a, accuracy.only_b) == (int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))
    assert accuracy.only_a > 0
    assert accuracy.difference == pytest.approx(accuracy.b_top1 - accuracy.a_top1)
    assert accuracy.low < accuracy.difference < accuracy.high
    assert (accuracy.output, accuracy.images, found.images) == ("scores", 75, "75 labelled images")


@pytest.mark.parametrize(("only_a", "only_b", "images"), [(0, 0, 50), (3, 9, 60), (64, 58, 9980), (10, 0, 10)])
def test_the_interval_is_that_of_the_paired_differences(only_a: int, only_b: int, images: int) -> None:
    """Image by image b's answer is 1, 0 or -1 better than a's, with one more image that each alone has right."""
    differences = np.repeat([1.0, -1.0, 0.0], [only_b + 1, only_a + 1, images - only_a - only_b])
    error = differences.std() / np.sqrt(len(differences))
    low, high = paired_interval(only_a, only_b, images)
    assert low == pytest.approx(max(-100, 100 * (differences.mean() - 1.959964 * error)))
    assert high == pytest.approx(100 * (differences.mean() + 1.959964 * error))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for share_a, share_b in ((0.01, 0.01), (0.05, 0.02), (0.2, 0.25)):
        drawn = rng.multinomial(300, [share_a, share_b, 1 - share_a - share_b], size=2000)
        intervals = [paired_interval(int(one), int(other), 300) for one, other, _ in drawn]
        held = np.mean([low <= 100 * (share_b - share_a) <= high for low, high in intervals])
        assert 0.935 < held < 0.99


def test_outputs_on_samples_and_accuracy_on_data(tmp_path: Path) -> None:
    a, b = linear(tmp_path / "a.onnx", ONE), linear(tmp_path / "b.onnx", OTHER)
    data, samples = pixels(tmp_path / "d.npz", [0, 1, 2, 3, 4, 5, 6] * 6), noise(4)
    both = compare(a, b, samples=samples, data=data, **GREY, **QUICK)
    assert both.outputs == compare(a, b, samples=samples, **QUICK).outputs
    assert both.accuracy == compare(a, b, data=data, **GREY, **QUICK).accuracy
    assert (both.count, both.images) == (4, "4 samples")
    assert both.accuracy is not None


def test_images_that_tell_no_accuracy(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", ONE)
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(4, 3), (9, 20), (30, 30)]):
        Image.new("L", size, 80 * number).save(tmp_path / "images" / f"{number}.png")
    data = load_labelled(tmp_path / "images", required=False)
    found = compare(a, a, data=data, **GREY, **QUICK)
    assert (found.count, found.images, found.accuracy) == (3, "3 images without labels", None)
    assert found.notes == ["nobody has told the classes of the images, so accuracy is not known"]
    nodes = [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "m"], ["long"]), node("Reshape", ["long", "s"], ["boxes"])]
    detector = save(tmp_path / "b.onnx", nodes, {"boxes": None}, m=BOXES, s=np.array([-1, 3, 2]))
    found = compare(detector, detector, data=pixels(tmp_path / "d.npz", [0, 1]), **GREY, **QUICK)
    assert found.accuracy is None
    assert found.notes == ["no output is one score per class, so accuracy is not known"]


def test_worth_by_labels_that_are_no_classes(tmp_path: Path) -> None:
    a, b = (save(tmp_path / f"{name}.onnx", HEAD, {"labels": None}, m=matrix) for name, matrix in (("a", ONE), ("b", -ONE)))
    classes, samples = pixels(tmp_path / "d.npz", [0, 1, 2, 3]), noise(3)
    truth = seen(classes) @ ONE > 0
    np.savez(tmp_path / "l.npz", x=np.load(tmp_path / "d.npz")["x"], y=truth)
    data = load_labelled(tmp_path / "l.npz")
    found = compare(a, b, data=data, **GREY, **QUICK)
    assert found.accuracy is None
    assert found.worth is not None
    assert (found.worth.output, found.worth.kind, found.worth.images) == ("labels", "multilabel", 4)
    assert found.worth.figures == {"F1": (100.0, 0.0)}
    assert found.notes == []
    assert compare(a, b, samples=samples, data=data, **GREY, **QUICK).worth == found.worth


HEAD = [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "m"], ["product"]), node("Sigmoid", ["product"], ["labels"])]


def test_labels_beyond_the_outputs(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", ONE)
    with pytest.raises(DataError, match="labels go up to 9, the network has 7 outputs"):
        compare(a, a, data=pixels(tmp_path / "d.npz", [0, 9]), **GREY, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "0 threads"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, r"mean has 2 numbers \(0.5,0.5\); .* has 1 channels"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", ONE)
    with pytest.raises(DreamQuantError, match=message):
        compare(path, path, **(QUICK | options))


def test_a_batch_that_a_file_does_not_take(tmp_path: Path) -> None:
    a, b = linear(tmp_path / "a.onnx", ONE), linear(tmp_path / "b.onnx", ONE, shape=(4, *SHAPE))
    with pytest.raises(OptionError, match=r"b\.onnx takes batches of 4 only, not of 2"):
        compare(a, b, samples=noise(2), batch=2, **QUICK)


# ---- quantized files of two tools


def scores_of(path: Path, images: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": images})[0])


def ours(model: Path, samples: Samples, path: Path) -> None:
    student = dreamquant.quantize(dreamquant.load(model), samples, bits="W8A8")
    dreamquant.export(student, path, samples)


def onnx_runtimes(model: Path, samples: Samples, path: Path) -> None:
    quantize_static(onnx.load(model), str(path), CalibrationReader(samples, "input"))


@pytest.mark.parametrize("tool", [ours, onnx_runtimes])
def test_a_quantized_file(tool: Callable[[Path, Samples, Path], None], digits: Path, tmp_path: Path) -> None:
    a, b = digits / FOLDED, tmp_path / "int8.onnx"
    network = dreamquant.load(a)
    tool(a, dreamquant.synthesize(network, 16, method="fractal"), b)
    data = load_labelled(digits / "digits_test.npz")
    found = compare(a, b, data=data, **QUICK)
    ((images, labels),) = data.batches(len(data), input_shape=(1, 16, 16), mean=network.mean, std=network.std)
    x, y = scores_of(a, images), scores_of(b, images)
    (output,) = found.outputs
    assert found.size_ratio == b.stat().st_size / a.stat().st_size < 0.5
    assert (sum(found.a.floats.values()), sum(found.b.quantized.values())) == (10, 10)
    assert output.relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-3)
    assert 0 < output.relative_l2 < 0.5
    assert output.top1 == pytest.approx(100 * (x.argmax(1) == y.argmax(1)).mean())
    assert found.accuracy is not None
    assert found.accuracy.b_top1 == pytest.approx(100 * (y.argmax(1) == labels).mean())
