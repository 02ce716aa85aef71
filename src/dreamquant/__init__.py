"""Quantize a trained neural network when its training data may not be touched.

    network = load("model.onnx")
    samples = synthesize(network, 64, method="fractal", seed=0)
    student = quantize(network, samples, bits="W8A8")
    artifact = export(student, Path("model.int8.onnx"), samples)

`run` is these lines, and measures what came of them.
"""

__version__ = "0.1.0"

from dreamquant import _threads  # noqa: F401  (first: it must run before torch is imported)
from dreamquant.errors import DreamQuantError
from dreamquant.export.export import Artifact, export
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.run import Result, run
from dreamquant.synthesis import Samples, synthesize

__all__ = [
    "Artifact",
    "DreamQuantError",
    "Network",
    "Result",
    "Samples",
    "Student",
    "export",
    "load",
    "quantize",
    "run",
    "synthesize",
]
