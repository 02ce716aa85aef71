"""A file against a target: every rule, and what it finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from dreamquant.conformity.opened import QuantizedFile
from dreamquant.conformity.rules import RULES, Finding
from dreamquant.errors import ModelError, UnsupportedOperator, blamed
from dreamquant.network.onnx_import.reading import read
from dreamquant.quantization.plan import Plan, Rule, Target, load_target

TOLD = 3  # findings that an error names


@dataclass(frozen=True)
class Conformity:
    """What the rules of a target find in a file. `counts` holds every rule that the target has, and how often it is broken."""

    target: str
    runtime: str
    proven: bool
    counts: Mapping[Rule, int]
    findings: tuple[Finding, ...]

    @property
    def conforms(self) -> bool:
        """Whether no rule is broken."""
        return not self.findings

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "counts": dict(self.counts), "conforms": self.conforms}

    def sentence(self) -> str:
        """What may be said of a file that was proven in ONNX Runtime and conforms."""
        if self.proven:
            return f"conforms to {self.target}'s rules ({self.runtime}), proven in ONNX Runtime"
        return f"conforms to {self.target}'s rules ({self.runtime}), proven in ONNX Runtime, not run on the target"


def conformity(proto: onnx.ModelProto, plan: Plan) -> Conformity:
    """What the rules of the target that a plan is named after find in a model."""
    target = plan.target
    assert isinstance(target, Target)
    file = QuantizedFile(proto)
    found = {rule: [Finding(rule, node, text) for node, text in RULES[rule](file, plan)] for rule in target.rules}
    findings = tuple(finding for findings in found.values() for finding in findings)
    counts = {rule: len(findings) for rule, findings in found.items()}
    return Conformity(plan.name, target.runtime, target.proven, counts, findings)


def check(path: str | os.PathLike[str], target: str) -> Conformity:
    """What a target's rules find in a quantized ONNX file, of whatever tool.

    Raises `OptionError` for a target that is not known, `ModelError` for a file that cannot be read.
    """
    plan = load_target(target)
    proto = read(Path(path))
    with blamed(ModelError, f"{path}: cannot be checked"):
        return conformity(proto, plan)


def require(proto: onnx.ModelProto, plan: Plan) -> Conformity:
    """The same of a model that has to conform; `UnsupportedOperator` names what of it does not."""
    found = conformity(proto, plan)
    if not found.conforms:
        told = "; ".join(map(str, found.findings[:TOLD]))
        more = len(found.findings) - TOLD
        raise UnsupportedOperator(f"{plan.name}'s rules are not met: {told}" + (f"; and {more} more" if more > 0 else ""))
    return found
