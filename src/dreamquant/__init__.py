"""Quantize a trained neural network when its training data may not be touched.

    network = load("model.onnx")
    samples = synthesize(network, 64, method="fractal", seed=0)
    student = quantize(network, samples, bits="W8A8")
    artifact = export(student, Path("model.int8.onnx"), samples)

`run` is these lines, and measures what came of them; `write_report` makes a page of its result, `compare` holds two files against
each other.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dreamquant import _threads  # noqa: F401  (first: it must run before torch is imported)
from dreamquant.assess.compare import Comparison, compare
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.conformity import Conformity, check
from dreamquant.errors import DreamQuantError
from dreamquant.exporters.export import Artifact, export
from dreamquant.flow import Result, run
from dreamquant.limits import memory_limit
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.storage import read_samples, write_samples
from dreamquant.synthesis import Samples, synthesize

if TYPE_CHECKING:
    from dreamquant.calibration import CalibrationReader, nncf_dataset
    from dreamquant.report import write_report

__all__ = [
    "Artifact",
    "CalibrationReader",
    "Comparison",
    "Conformity",
    "DreamQuantError",
    "LabelledImages",
    "Network",
    "Result",
    "Samples",
    "Student",
    "check",
    "compare",
    "export",
    "load",
    "load_labelled",
    "memory_limit",
    "nncf_dataset",
    "quantize",
    "read_samples",
    "run",
    "synthesize",
    "write_report",
    "write_samples",
]


LATE = {"CalibrationReader": "calibration", "nncf_dataset": "calibration", "write_report": "report"}


def __getattr__(name: str) -> Any:
    """What needs more than a run does, imported when it is first asked for."""
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dreamquant.{LATE[name]}"), name)
