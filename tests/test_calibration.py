"""Samples reach other quantizers batch by batch, as they are."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

import dreamquant
from dreamquant.calibration import CalibrationReader, nncf_dataset
from dreamquant.errors import OptionError
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples


@pytest.fixture
def samples() -> Samples:
    return Samples(torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_every_image_is_read_once_in_order(batch: int, sizes: list[int], samples: Samples) -> None:
    reader = CalibrationReader(samples, "pixels", batch)
    found = list(reader)

    assert isinstance(reader, CalibrationDataReader)
    assert CalibrationDataReader in CalibrationReader.__mro__
    assert len(reader) == len(sizes)
    assert [list(item) for item in found] == [["pixels"]] * len(sizes)
    assert [len(item["pixels"]) for item in found] == sizes
    assert np.array_equal(np.concatenate([item["pixels"] for item in found]), samples.images.numpy())
    assert reader.get_next() is None
    reader.rewind()
    again = reader.get_next()
    assert again is not None
    assert np.array_equal(again["pixels"], found[0]["pixels"])


def test_a_range_of_batches(samples: Samples) -> None:
    reader = CalibrationReader(samples, "pixels")
    reader.set_range(1, 3)
    assert [np.array_equal(item["pixels"][0], samples.images[i]) for i, item in zip((1, 2), reader, strict=True)] == [True] * 2
    reader.set_range(4, 99)
    assert len(list(reader)) == 1
    reader.rewind()
    assert len(list(reader)) == 5


def test_images_of_any_memory_layout(samples: Samples) -> None:
    turned = Samples(samples.images.transpose(2, 3))
    item = CalibrationReader(turned, "pixels").get_next()
    assert item is not None
    assert item["pixels"].flags.c_contiguous
    assert np.array_equal(item["pixels"], turned.images[:1].numpy())


def test_what_is_impossible_is_told(samples: Samples) -> None:
    with pytest.raises(OptionError, match="a batch of 0 images"):
        CalibrationReader(samples, "pixels", 0)
    with pytest.raises(OptionError, match="name of the ONNX file's input is empty"):
        CalibrationReader(samples, "")


def test_input_name(digits: Path, residual_onnx: Path) -> None:
    assert dreamquant.load(digits / "digits_bnfolded.onnx").input_name == "input"
    assert dreamquant.load(residual_onnx).input_name == "pixels"
    assert dreamquant.load(digits / "digits.pt2").input_name == ""


@pytest.mark.parametrize("options", [{}, {"extra_options": {"CalibStridedMinMax": 5}}])
def test_onnx_runtime_quantizes_with_it(options: dict[str, Any], samples: Samples, digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8.onnx"
    model = onnx.load(digits / "digits_bnfolded.onnx")  # in memory: no advice on its preprocessing is printed
    quantize_static(model, str(output), CalibrationReader(samples, "input"), calibrate_method=CalibrationMethod.MinMax, **options)
    assert Counter(node.op_type for node in onnx.load(output).graph.node)["QuantizeLinear"] > 10
    assert onnx_runner(output)(samples.images.numpy()).shape == (5, 10)


def test_nncf_quantizes_with_it(samples: Samples, digits: Path, tmp_path: Path) -> None:
    nncf = pytest.importorskip("nncf", reason="needs the extra dreamquant[nncf]")
    dataset = nncf_dataset(samples, "input", batch=2)
    assert isinstance(dataset, nncf.Dataset)
    assert [len(item["input"]) for item in dataset.get_inference_data()] == [2, 2, 1]
    quantized = nncf.quantize(onnx.load(digits / "digits_bnfolded.onnx"), dataset, subset_size=len(samples))
    onnx.save(quantized, tmp_path / "int8.onnx")
    assert Counter(node.op_type for node in quantized.graph.node)["QuantizeLinear"] > 10
    assert onnx_runner(tmp_path / "int8.onnx")(samples.images.numpy()).shape == (5, 10)


def test_without_a_name_nncf_gets_tensors(samples: Samples) -> None:
    pytest.importorskip("nncf", reason="needs the extra dreamquant[nncf]")
    items = list(nncf_dataset(samples, batch=2).get_inference_data())
    assert torch.equal(torch.cat(items), samples.images)
    with pytest.raises(OptionError, match="a batch of 0 images"):
        nncf_dataset(samples, batch=0)


def test_without_nncf_its_extra_is_named(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(OptionError, match=r"needs nncf, .*pip install 'dreamquant\[nncf\]'"):
        nncf_dataset(samples, "input")


def test_other_tools_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, dreamquant; heavy = ['onnxruntime.quantization', 'nncf'];"
        "before = [name in sys.modules for name in heavy]; dreamquant.CalibrationReader;"
        "print(before, [name in sys.modules for name in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False] [True, False]"
    with pytest.raises(AttributeError, match="no attribute 'CalibrationWriter'"):
        _ = dreamquant.CalibrationWriter
