"""A file with more work takes longer, and a file takes as long as itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dreamquant.assess import latency
from dreamquant.assess.latency import compare_latency, processor_name
from dreamquant.errors import ModelError, OptionError

SHAPE = (8, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> None:
    """Times are taken as they are for users."""


def chain(path: Path, convolutions: int, batch: int | str = "n") -> Path:
    """An ONNX file of this many 3x3 convolutions of 8 channels."""
    weight = np.random.default_rng(0).standard_normal((8, 8, 3, 3), dtype=np.float32) / 10
    nodes = [helper.make_node("Conv", [f"x{i}", "weight"], [f"x{i + 1}"], pads=[1, 1, 1, 1]) for i in range(convolutions)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, (batch, *SHAPE))],
        [helper.make_tensor_value_info(f"x{convolutions}", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_fifty_times_the_work_takes_much_longer(tmp_path: Path) -> None:
    big, small = chain(tmp_path / "big.onnx", 50), chain(tmp_path / "small.onnx", 1)
    result = compare_latency(big, small, input_shape=SHAPE, batch=4, rounds=9)
    assert result.ratio > 5
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.a_ms > result.b_ms > 0
    assert compare_latency(small, big, input_shape=SHAPE, batch=4, rounds=9).ratio < 0.2


def test_what_was_measured_is_told(tmp_path: Path) -> None:
    path = chain(tmp_path / "model.onnx", 2)
    result = compare_latency(path, path, input_shape=SHAPE, batch=2, threads=2, rounds=3)
    assert (result.batch, result.threads, result.rounds) == (2, 2, 3)
    assert result.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert result.processor == processor_name() != ""


def test_files_take_turns_in_samples_of_five_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where every run of `a` takes 2 ms and every run of `b` 4 ms, exactly that is found."""
    a, b = chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 2)
    clock = [0.0]
    turns: list[str] = []

    class Session:
        def __init__(self, output: str) -> None:
            self.name, self.cost = ("a", 0.002) if output == "x1" else ("b", 0.004)

        def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> None:
            assert outputs == [{"a": "x1", "b": "x2"}[self.name]]
            assert feed["x0"].shape == (1, *SHAPE)
            clock[0] += self.cost
            turns.append(self.name)

    def with_fake_session(path: Path, *, threads: int | None, layout: str | None) -> object:
        runner = onnxruntime_runner(path, threads=threads, layout=layout)
        runner.session = Session(runner.output_name)
        return runner

    onnxruntime_runner = latency.onnx_runner
    monkeypatch.setattr(latency, "onnx_runner", with_fake_session)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    result = compare_latency(a, b, input_shape=SHAPE, rounds=3)
    assert (result.a_ms, result.b_ms) == (pytest.approx(2), pytest.approx(4))
    assert (result.ratio_low, result.ratio, result.ratio_high) == pytest.approx((0.5, 0.5, 0.5))
    assert "".join(turns).endswith("aaaabbb" * 3)  # three runs of 2 ms, two of 4 ms, and one before each that is not timed


def test_options_that_cannot_be(tmp_path: Path) -> None:
    path, fixed = chain(tmp_path / "model.onnx", 1), chain(tmp_path / "fixed.onnx", 1, batch=1)
    with pytest.raises(OptionError, match="rounds is 0"):
        compare_latency(path, path, input_shape=SHAPE, rounds=0)
    with pytest.raises(OptionError, match="10,000 at the most"):
        compare_latency(path, path, input_shape=SHAPE, rounds=2**62)
    with pytest.raises(OptionError, match="batch is 0"):
        compare_latency(path, path, input_shape=SHAPE, batch=0)
    with pytest.raises(OptionError, match="0 threads"):
        compare_latency(path, path, input_shape=SHAPE, threads=0)
    with pytest.raises(OptionError, match=r"fixed\.onnx takes batches of 1 only, not of 2"):
        compare_latency(path, fixed, input_shape=SHAPE, batch=2)
    with pytest.raises(ModelError, match=r"does not run on noise of shape \(1, 3, 16, 16\)"):
        compare_latency(path, path, input_shape=(3, 16, 16))
