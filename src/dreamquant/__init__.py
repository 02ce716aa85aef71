"""Quantize a trained neural network when its training data may not be touched.

    network = load("model.onnx")
    samples = synthesize(network, 64, method="fractal", seed=0)
    student = quantize(network, samples, bits="W8A8")
    artifact = export(student, Path("model.int8.onnx"), samples)

`run` is these lines, and measures what came of them.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from dreamquant import _threads  # noqa: F401  (first: it must run before torch is imported)
from dreamquant.errors import DreamQuantError
from dreamquant.export.export import Artifact, export
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.run import Result, run
from dreamquant.storage import read_samples, write_samples
from dreamquant.synthesis import Samples, synthesize

if TYPE_CHECKING:
    from dreamquant.calibration import CalibrationReader, nncf_dataset

__all__ = [
    "Artifact",
    "CalibrationReader",
    "DreamQuantError",
    "Network",
    "Result",
    "Samples",
    "Student",
    "export",
    "load",
    "nncf_dataset",
    "quantize",
    "read_samples",
    "run",
    "synthesize",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    """What needs `onnxruntime.quantization`, imported when it is first asked for."""
    if name not in ("CalibrationReader", "nncf_dataset"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dreamquant import calibration

    return getattr(calibration, name)
