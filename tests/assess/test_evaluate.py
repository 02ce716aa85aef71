"""Accuracy against counting by hand, and the runtime's files of every batch size against the network they hold."""

from __future__ import annotations

import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from dreamquant.assess.evaluate import Evaluation, evaluate, torch_runner
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network.graph import Network, Source
from dreamquant.runtime import onnx_runner

GREY = {"input_shape": (1, 1, 1), "mean": (0.0,), "std": (1.0,)}
NATURAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def numbered(labels: list[int]) -> LabelledImages:
    """Image i is one pixel of value i."""
    images = [Image.new("L", (1, 1), i) for i in range(len(labels))]
    return LabelledImages(np.array(labels, np.int64), lambda: nullcontext(images.__getitem__))


def table(*scores: list[float]) -> Any:
    """A network that looks the scores of image i up."""
    rows = np.array(scores, np.float32)
    return lambda images: rows[np.rint(images[:, 0, 0, 0] * 255).astype(int)]


def weighted(shape: tuple[int | str, ...], seed: int = 0, **metadata: str) -> bytes:
    """An ONNX model that multiplies flattened images (n, 2, 3, 4) by a matrix, for inputs declared as `shape`."""
    weight = np.random.default_rng(seed).standard_normal((24, 5), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["y"])],
        "weighted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


def noise(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 2, 3, 4), dtype=np.float32)


# ---- evaluate


def test_top1_and_top5_by_hand() -> None:
    best_first = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    result = evaluate(table(*[best_first] * 8), numbered([0, 0, 0, 1, 4, 5, 6, 6]), **GREY)
    assert (result.top1, result.top5, result.images) == (37.5, 62.5, 8)
    assert result.predictions.tolist() == [0] * 8
    assert result.predictions.dtype == np.int64
    assert "predictions" not in repr(result)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_size_changes_nothing_but_the_callback(batch: int) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((50, 10)), rng.integers(0, 10, 50)
    heard: list[tuple[int, int]] = []
    run = table(*scores.tolist())
    result = evaluate(run, numbered(labels.tolist()), batch=batch, callback=lambda *done_all: heard.append(done_all), **GREY)
    order = np.argsort(-scores, axis=1)
    assert result.top1 == 100 * np.mean(order[:, 0] == labels)
    assert result.top5 == 100 * np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    assert np.array_equal(result.predictions, order[:, 0])
    assert heard == [(min(done, 50), 50) for done in range(batch, 50 + batch, batch)]


def test_equal_scores_count_once_and_as_argmax_does() -> None:
    """A network that says the same of everything is right on one class, not on all."""
    result = evaluate(table(*[[1.0] * 10] * 10), numbered(list(range(10))), **GREY)
    assert (result.top1, result.top5) == (10, 50)


def test_few_classes_and_scores_in_pooled_shape() -> None:
    run = table([0, 1], [1, 0])
    result = evaluate(lambda images: run(images)[:, :, None, None], numbered([1, 1]), **GREY)
    assert (result.top1, result.top5) == (50, 100)


def test_seconds_are_those_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    result = evaluate(table([0, 1], [1, 0]), numbered([1, 0]), batch=1, **GREY)
    assert result == Evaluation(100, 100, 2, 0.75, result.predictions)


def test_labels_beyond_the_outputs_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match="labels go up to 305, the network has 10 outputs, 0 to 9"):
        evaluate(table(*[[0.0] * 10] * 2), numbered([0, 305]), batch=1, **GREY)
    evaluate(table([0.0] * 10), numbered([9]), **GREY)


def test_outputs_that_are_no_scores() -> None:
    for shape in ((2,), (3, 10), (2, 10, 4, 4)):
        with pytest.raises(DataError, match=r"2 images gave an output of shape .* not one score per class"):
            evaluate(lambda _, shape=shape: np.zeros(shape), numbered([0, 0]), **GREY)
    with pytest.raises(ModelError, match=r"not numbers \(NaN\) on 1 of 2 images"):
        evaluate(table([0, 1], [0, float("nan")]), numbered([0, 0]), **GREY)


def test_options_that_cannot_be() -> None:
    run = table([0.0, 1.0])
    with pytest.raises(OptionError, match="mean has 3 values and the network takes 1 channels"):
        evaluate(run, numbered([0]), input_shape=(1, 1, 1), mean=(0, 0, 0), std=(1,))
    with pytest.raises(OptionError, match="std has 0 values"):
        evaluate(run, numbered([0]), input_shape=(1, 1, 1), mean=(0,), std=())
    with pytest.raises(OptionError, match="a batch of 0 images"):
        evaluate(run, numbered([0]), batch=0, **GREY)
    with pytest.raises(DataError, match="no labelled images"):
        evaluate(run, numbered([]), **GREY)
    with pytest.raises(DataError, match="classes of the images are not known"):
        evaluate(run, numbered([-1, -1]), **GREY)


# ---- the runtime


@pytest.mark.parametrize("batch", ["n", 1, 3, 8])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_file_of_any_batch_size_runs_any_number_of_images(batch: int | str, count: int) -> None:
    images = noise(count)
    weight = numpy_helper.to_array(onnx.load_model_from_string(weighted(("n", 2, 3, 4))).graph.initializer[0])
    runner = onnx_runner(weighted((batch, 2, 3, 4)), threads=1)
    assert runner.batch == (None if batch == "n" else batch)
    assert runner.input_shape == (2, 3, 4)
    np.testing.assert_allclose(runner(images), images.reshape(count, -1) @ weight, rtol=1e-4, atol=1e-5)


def test_any_outputs_in_any_order() -> None:
    model = onnx.load_model_from_string(weighted((2, 2, 3, 4)))
    model.graph.node.append(helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))
    runner = onnx_runner(model.SerializeToString())
    assert {name: (output.kind, output.sizes) for name, output in runner.outputs.items()} == {
        "y": ("tensor(float)", (2, 5)),
        "sum": ("tensor(float)", ()),
    }
    total, scores = runner.run(noise(4), ["sum", "y"])
    assert np.array_equal(scores, runner(noise(4)))
    np.testing.assert_allclose(total, scores.reshape(2, 10).sum(1), rtol=1e-4)


def test_a_path_gives_the_same_as_its_bytes_and_as_the_graph_as_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(weighted(("n", 2, "h", "w"), **{"dreamquant.mean": "0.5,0.25"}))
    runner = onnx_runner(path)
    assert runner.input_shape == (2, None, None)
    assert runner.metadata == {"dreamquant.mean": "0.5,0.25"}
    np.testing.assert_allclose(runner(noise(4)), onnx_runner(path.read_bytes(), optimize=False)(noise(4)), rtol=1e-5)


def test_files_that_cannot_be_run(tmp_path: Path) -> None:
    corrupt, cut = tmp_path / "corrupt.onnx", tmp_path / "cut.onnx"
    corrupt.write_bytes(b"this is not a protobuf")
    cut.write_bytes(weighted(("n", 2, 3, 4))[:200])
    cases: dict[Path | bytes, str] = {
        tmp_path / "absent.onnx": "there is no file .*absent",
        tmp_path: "there is no file",
        corrupt: r"cannot load .*corrupt\.onnx: ",
        cut: r"cannot load .*cut\.onnx: ",
        b"": "cannot load the ONNX model: ",
        weighted((2, 24)): r"takes x: tensor\(float\) \[2, 24\], not one batch of images",
    }
    for source, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            onnx_runner(source)
        assert "\n" not in str(caught.value)


def test_images_that_a_file_does_not_take() -> None:
    runner = onnx_runner(weighted(("n", 2, 3, 4)))
    with pytest.raises(ModelError, match=r"the ONNX model does not run: .*INVALID_ARGUMENT") as caught:
        runner(np.zeros((1, 2, 5, 4), np.float32))
    assert "\n" not in str(caught.value)


def test_threads_must_be_positive() -> None:
    with pytest.raises(OptionError, match="0 threads"):
        onnx_runner(weighted(("n", 2, 3, 4)), threads=0)


def test_a_network_runs_over_numpy_without_gradients() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(24, 5)).eval()
    network = Network(torch.fx.symbolic_trace(module), (2, 3, 4), Source("module", "test"), batch=2)
    images = noise(5)
    output = torch_runner(network)(images)
    assert isinstance(output, np.ndarray)
    np.testing.assert_allclose(output, module(torch.from_numpy(images)).detach(), rtol=1e-5)


# ---- real networks and real images


def test_the_shipped_example_recognises_digits() -> None:
    runner = onnx_runner(EXAMPLES / "digits" / "digits_bnfolded.onnx")
    assert runner.input_shape == (1, 16, 16)
    mean, std = (tuple(map(float, runner.metadata[f"dreamquant.{name}"].split(","))) for name in ("mean", "std"))
    data = load_labelled(EXAMPLES / "digits" / "digits_test.npz")
    result = evaluate(runner, data, input_shape=(1, 16, 16), mean=mean, std=std)
    assert result.images == 597
    assert result.top1 > 99.5


def test_the_shipped_files_hold_one_network() -> None:
    module = runpy.run_path(str(EXAMPLES / "digits_network.py"))["network"]()
    program = torch.export.load(EXAMPLES / "digits" / "digits.pt2").module()
    images = np.random.default_rng(0).standard_normal((7, 1, 16, 16), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(program(torch.from_numpy(images)), expected, rtol=1e-4, atol=1e-4)
    runner = onnx_runner(EXAMPLES / "digits" / "digits_bnfolded.onnx")
    np.testing.assert_allclose(runner(images), expected, rtol=1e-4, atol=1e-4)


def test_cifar10_accuracy_is_the_published_one(data_dir: Path) -> None:
    data = load_labelled(data_dir / "cifar10" / "cifar10_test.npz")
    runner = onnx_runner(data_dir / "cifar10" / "resnet20_bnfolded.onnx", threads=1)
    result = evaluate(runner, data, input_shape=(3, 32, 32), **NATURAL)
    assert result.images == 9980
    assert result.top1 == pytest.approx(91.73, abs=0.02)


def test_imagenet_accuracy_is_the_published_one(data_dir: Path) -> None:
    folder = data_dir / "imagenet"
    data = load_labelled(folder / "val10x50.zip", labels=folder / "val10x50_labels.csv")
    runner = onnx_runner(folder / "mobilenetv1_025_bnfolded.onnx", threads=1)
    result = evaluate(runner, data, input_shape=(3, 224, 224), **NATURAL)
    assert result.images == 500
    assert result.top1 == pytest.approx(48.2, abs=0.21)
