"""What is said of a result is measured on the file, on images that set no range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamquant.assess.assess import assess, float_file
from dreamquant.exporters.export import export
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.scores import divergence, top1_agreement
from dreamquant.quantization.quantize import quantize
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples


@pytest.mark.parametrize("name", ["digits.pt2", "digits_bnfolded.onnx"])
def test_a_result_is_measured(digits: Path, tmp_path: Path, images: Callable[..., Tensor], name: str) -> None:
    network = load(digits / name)
    samples, held_out = (Samples(images(12, network.input_shape, seed=seed)) for seed in (0, 1))
    student = quantize(network, samples)
    path = tmp_path / "out.onnx"
    artifact = export(student, path, samples)
    code = network.graph.code
    found = assess(network, student, artifact, held_out)
    scores = torch.from_numpy(onnx_runner(path)(held_out.images.numpy()))

    assert found.agreement.top1 == top1_agreement(network(held_out.images), scores)
    assert found.agreement.kl == pytest.approx(divergence(network(held_out.images), scores), rel=1e-6)
    assert found.agreement.kind == "classes"
    assert found.size == path.stat().st_size
    assert found.float_size > 2 * found.size
    assert found.float_layers == []
    assert len(found.layers) == 10
    assert found.latency.a_ms > 0
    assert found.latency.threads == 1
    assert network.graph.code == code
    if name.endswith(".onnx"):
        assert found.float_size == (digits / name).stat().st_size


def test_the_float_file_is_the_networks_own_or_one_that_computes_the_same(
    residual: Network, residual_onnx: Path, calibration: Samples, tmp_path: Path
) -> None:
    assert float_file(load(residual_onnx), tmp_path) == residual_onnx
    written = float_file(residual, tmp_path)
    actual = torch.from_numpy(onnx_runner(written)(calibration.images.numpy()))

    assert written.parent == tmp_path
    torch.testing.assert_close(actual, residual(calibration.images), rtol=1e-4, atol=1e-4)
