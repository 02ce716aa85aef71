"""Whatever a user may name becomes a network, or one line that says what was given and why it is none."""

from __future__ import annotations

import io
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from dreamquant.errors import DreamQuantError, ModelError, OptionError
from dreamquant.network.input_space import format_numbers, parse_numbers
from dreamquant.network.load import load

MODEL = """
import torch
from torch import nn

NUMBER = 3

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def number():
    return 7

def failing():
    raise RuntimeError("first line\\nsecond line")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()


def exported(module: nn.Module, *sizes: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.zeros(*sizes),)), file)
    return file.getvalue()


# --- every kind -------------------------------------------------------------------------------------------------------


def test_a_module() -> None:
    network = load(small(), input_shape=(3, 5, 7), mean=(0.1, 0.2, 0.3), std=(1, 0.9, 0.8))

    assert network.source.kind == "module"
    assert network.input_shape == (3, 5, 7)
    assert (network.mean, network.std) == ((0.1, 0.2, 0.3), (1, 0.9, 0.8))
    assert network(torch.zeros(2, 3, 5, 7)).shape == (2, 60)


@pytest.mark.parametrize(("name", "kind"), [("digits.pt2", "pt2"), ("digits_bnfolded.onnx", "onnx")])
@pytest.mark.parametrize("form", [str, Path], ids=["str", "Path"])
def test_a_file_with_its_normalisation(digits: Path, name: str, kind: str, form: Callable[[Path], str | Path]) -> None:
    network = load(form(digits / name))

    assert network.source.kind == kind
    assert network.source.path == digits / name
    assert network.input_shape == (1, 16, 16)
    assert (network.mean, network.std) == ((0.3054,), (0.3187,))
    assert network.batch is None


def test_both_files_are_the_same_network(digits: Path, images: Callable[..., Tensor]) -> None:
    x = images(5, (1, 16, 16))

    torch.testing.assert_close(load(digits / "digits.pt2")(x), load(digits / "digits_bnfolded.onnx")(x), rtol=1e-3, atol=1e-3)


def test_what_is_given_goes_before_what_is_stored(digits: Path) -> None:
    network = load(digits / "digits.pt2", mean=(0.5,), std=(0.25,))

    assert (network.mean, network.std) == ((0.5,), (0.25,))


def test_a_callable_of_a_file(script: Path) -> None:
    network = load(f"{script}:network", input_shape=(3, 6, 6))

    assert network.source.kind == "module"
    assert network.source.text == f"{script}:network"
    assert network(torch.zeros(1, 3, 6, 6)).shape == (1, 4)


def test_a_callable_of_a_module(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = script.parent / "my_package_of_models"
    package.mkdir()
    shutil.move(script, package / "inner.py")
    monkeypatch.syspath_prepend(script.parent)

    assert load("my_package_of_models.inner:network", input_shape=(3, 6, 6)).input_shape == (3, 6, 6)
    for name in ("my_package_of_models.inner", "my_package_of_models"):
        sys.modules.pop(name)


# --- every mistake ----------------------------------------------------------------------------------------------------


def assert_refused(kind: type[DreamQuantError], message: str, given: str, model: object, **options: object) -> None:
    with pytest.raises(kind, match=message or None) as caught:
        load(model, **options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert given in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".py:network"])
def test_a_file_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    assert_refused(
        ModelError, "there is no|does not exist|No such file", "absent", f"{tmp_path}/absent{suffix}", input_shape=(3, 5, 5)
    )


@pytest.mark.parametrize("content", [b"", b"some text\nof two lines", b"PK\x03\x04 broken", bytes(range(256)) * 20])
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_that_is_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"given{suffix}"
    path.write_bytes(content)
    assert_refused(ModelError, "", f"given{suffix}", path)


@pytest.mark.parametrize("name", ["digits.pt2", "digits_bnfolded.onnx"])
def test_a_truncated_file(digits: Path, tmp_path: Path, name: str) -> None:
    whole = (digits / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert_refused(ModelError, "", name, tmp_path / name)


def test_a_zip_that_is_no_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "given.pt2", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert_refused(ModelError, "cannot be read by torch", "given.pt2", tmp_path / "given.pt2")


@pytest.mark.parametrize("text", ["resnet18", "model.pth", "", "a/b", "model.tflite"])
def test_what_is_no_form_of_a_model(text: str) -> None:
    assert_refused(ModelError, "is no model that is known here; give a .onnx file, a .pt2 file", text, text)


def test_callables_that_are_not_there_or_none(script: Path) -> None:
    for name in ("netwrok", "NUMBER"):
        assert_refused(
            ModelError, rf"has no callable '{name}' \(known: failing, network, number\)", str(script), f"{script}:{name}"
        )


def test_callables_that_do_something_else(script: Path) -> None:
    assert_refused(ModelError, r"number\(\) returned a int, not a torch.nn.Module", str(script), f"{script}:number")
    assert_refused(ModelError, r"calling failing\(\) failed: RuntimeError: first line$", str(script), f"{script}:failing")


@pytest.mark.parametrize("content", ["import absent_package", "def (", "1 / 0"])
def test_scripts_that_cannot_be_imported(tmp_path: Path, content: str) -> None:
    (tmp_path / "broken_script.py").write_text(content)
    assert_refused(ModelError, "cannot be imported", "broken_script.py", f"{tmp_path}/broken_script.py:network")
    assert "broken_script" not in sys.modules


def test_modules_that_cannot_be_imported() -> None:
    assert_refused(ModelError, "module 'absent.package' cannot be imported", "absent.package", "absent.package:network")


def test_a_module_without_an_input_shape(script: Path) -> None:
    assert_refused(ModelError, "give input_shape", "my_model.py", f"{script}:network")
    assert_refused(ModelError, "give input_shape", "Sequential", small())


@pytest.mark.parametrize("shape", [(3, 2, 2), (4, 8, 8), (3, 0, 8), (3, -1, 8), (3, 8), ()])
def test_an_input_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises((ModelError, OptionError)) as caught:
        load(small(), input_shape=shape)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(shape) in str(caught.value)


def test_a_shape_other_than_the_files(digits: Path) -> None:
    for name in ("digits.pt2", "digits_bnfolded.onnx"):
        assert_refused(ModelError, "1, ?8, ?8", name, digits / name, input_shape=(1, 8, 8))


def dynamic(path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("GlobalAveragePool", ["c"], ["y"])],
        "dynamic",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_file_of_any_image_size_needs_one(tmp_path: Path) -> None:
    path = dynamic(tmp_path / "dynamic.onnx")
    assert_refused(ModelError, "input_shape|--input-shape", "dynamic.onnx", path)
    assert load(path, input_shape=(3, 7, 5)).input_shape == (3, 7, 5)


def test_a_program_of_vectors(tmp_path: Path) -> None:
    (tmp_path / "vectors.pt2").write_bytes(exported(nn.Linear(4, 2), 3, 4))
    assert_refused(
        ModelError,
        r"one input of images \(N, C, H, W\) is needed, the program has \(3, 4\)",
        "vectors.pt2",
        tmp_path / "vectors.pt2",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, digits: Path, value: float) -> None:
    module = small()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = value  # type: ignore[index, operator]
    (tmp_path / "bad.pt2").write_bytes(exported(module, 2, 3, 5, 5))
    assert_refused(ModelError, "1 of 108 values of .*weight are NaN or infinite", "bad.pt2", tmp_path / "bad.pt2")
    proto = onnx.load(digits / "digits_bnfolded.onnx")
    tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    assert_refused(ModelError, "1 of|NaN|infinite|finite", "bad.onnx", tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), None, "mean and std belong together"),
        (None, (0.5,), "mean and std belong together"),
        ((0.5,), (0.5,), r"mean has 1 numbers \(0.5\); .* has 3 channels"),
        ((0.1, 0.2, 0.3), (0.5, 0.5), r"std has 2 numbers \(0.5,0.5\); .* has 3 channels"),
        ((0.1, 0.2, 0.3), (1.0, 0.0, 1.0), "std is 1,0,1; all must be above 0"),
        ((0.1, 0.2, 0.3), (1.0, -1.0, 1.0), "std is 1,-1,1; all must be above 0"),
        ((0.1, float("nan"), 0.3), (1.0, 1.0, 1.0), "mean is 0.1,nan,0.3; all must be finite"),
        ((0.1, 0.2, 0.3), (1.0, float("inf"), 1.0), "std is 1,inf,1; all must be finite"),
    ],
)
def test_normalisations_that_do_not_fit(mean: tuple[float, ...] | None, std: tuple[float, ...] | None, message: str) -> None:
    assert_refused(OptionError, message, "", small(), input_shape=(3, 5, 5), mean=mean, std=std)


@pytest.mark.parametrize(("text", "numbers"), [("0.5", (0.5,)), ("1, 2,3e-1", (1.0, 2.0, 0.3)), ("", ()), ("  ", ())])
def test_numbers_are_read(text: str, numbers: tuple[float, ...]) -> None:
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["a", "1,,2", "0.5;0.5", "1,"])
def test_what_are_no_numbers(text: str) -> None:
    with pytest.raises(OptionError, match="is no list of numbers like"):
        parse_numbers(text)


@pytest.mark.parametrize("numbers", [(), (0.5,), (0.1 + 0.2, 1 / 3, 1e-17), (-2.0, 0.0)])
def test_numbers_are_written_as_they_are_read(numbers: tuple[float, ...]) -> None:
    assert parse_numbers(format_numbers(numbers)) == numbers
