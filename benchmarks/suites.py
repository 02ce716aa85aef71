"""What is measured: each suite is a list of cases, each case a line of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One way of quantizing one network. `images` are those of a synthesis method, or `real` ones of its training data's kind."""

    model: str
    label: str
    bits: str
    images: str
    plan: str = "deploy"
    count: int = 64
    options: dict[str, Any] = field(default_factory=dict)  # of the synthesis method
    budget: str = "standard"
    changes: dict[str, Any] = field(default_factory=dict)  # of the plan
    allocation: dict[str, Any] = field(default_factory=lambda: {"method": "uniform"})


TENSOR = {"weight_granularity": "tensor"}
DFQ = TENSOR | {"range_source": "batchnorm"}
DREAMER = {"resnet20": "rsd", "resnet56": "rsd", "mobilenetv1": "fractal", "mobilenetv2": "fractal", "squeezenet": "fractal"}


def dfq() -> Iterable[Case]:
    """What equalization and bias correction give back of the accuracy that one grid for a whole weight takes."""
    equalized = {"transforms": ["fold_batchnorm", "equalize"]}
    absorbed = {"transforms": ["fold_batchnorm", "equalize", "absorb_bias"]}
    lines: dict[str, dict[str, Any]] = {
        "per tensor": TENSOR | {"bias_correction": "none"},
        "per tensor, equalized": TENSOR | equalized | {"bias_correction": "none"},
        "per tensor, equalized, absorbed": TENSOR | absorbed | {"bias_correction": "none"},
        "per tensor, bias corrected": TENSOR,
        "per tensor, equalized, bias corrected": TENSOR | equalized,
        "per channel": {"bias_correction": "none"},
        "per channel, bias corrected": {},
        "no samples: per tensor": DFQ | {"bias_correction": "none"},
        "no samples: per tensor, equalized, absorbed, corrected (DFQ)": DFQ | absorbed | {"bias_correction": "batchnorm"},
        "no samples: per channel, corrected": {"range_source": "batchnorm", "bias_correction": "batchnorm"},
    }
    for model in ("mobilenetv2", "mobilenetv1"):
        for label, changes in lines.items():
            yield Case(model, label, "W8A8", "fractal", changes=changes)


def granularity() -> Iterable[Case]:
    """Weights per tensor, per channel, hybrid, on codebooks, and with bits layer by layer."""
    lines: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "per tensor": (TENSOR, {"method": "uniform"}),
        "per channel": ({}, {"method": "uniform"}),
        "hybrid, accuracy": ({}, {"method": "hybrid"}),
        "hybrid, latency": ({}, {"method": "hybrid", "mode": "latency"}),
        "quartiles, per channel": ({"weight_levels": "quartiles"}, {"method": "uniform"}),
        "kmeans, per channel": ({"weight_levels": "kmeans"}, {"method": "uniform"}),
    }
    for model in ("resnet20", "resnet56", "mobilenetv2", "squeezenet"):
        for bits in ("W8A8", "W6A6", "W4A4"):
            for label, (changes, allocation) in lines.items():
                yield Case(model, label, bits, DREAMER[model], changes=changes, allocation=allocation)
        yield Case(model, "mixed, average 4", "W4A8", DREAMER[model], allocation={"method": "mixed", "average": 4.0})
        yield Case(model, "per channel", "W4A8", DREAMER[model])


SUITES = {"dfq": dfq, "granularity": granularity}
