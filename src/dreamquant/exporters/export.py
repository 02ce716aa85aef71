"""Student -> file. The file takes its place only after it was read back and found to do what the student does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import helper

from dreamquant.conformity import Conformity, require
from dreamquant.devices import CPU
from dreamquant.errors import OptionError, OutputError
from dreamquant.exporters.qdq import to_onnx
from dreamquant.exporters.verify import Verification, verify
from dreamquant.files import atomic_path
from dreamquant.network.output_properties import properties as output_properties
from dreamquant.plain import plain_torch
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples

LARGEST_PROTO = 2**31 - 1  # bytes; what protobuf can hold


@dataclass(frozen=True)
class Artifact:
    """An exported file, its size in bytes, and how far it and its student are apart.

    `outputs` are the values in the file that the student gives: the file's outputs or, of those behind what is left of a file
    where sizes depend on values, what that reads. `values`: what the file calls the nodes of the student's
    graph. `conformity`: what the rules of the plan's target say, None for a plan of no target.
    """

    path: Path
    size: int
    verification: Verification
    outputs: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    conformity: Conformity | None = None


@plain_torch()
def export(
    student: Student, path: str | os.PathLike[str], samples: Samples, *, metadata: Mapping[str, str] | None = None
) -> Artifact:
    """Write `path` (.onnx) and prove it on the samples, both on the processor. `metadata` goes into the file's properties, beside
    those it came with.

    Raises `OptionError` for another suffix, `OutputError` when the file cannot be written, `UnsupportedOperator` for what the
    format cannot say or the plan's target refuses, `VerificationError` when the file does not do what was measured; `path` is
    then as it was.
    """
    path = Path(path)
    check_format(path)
    student = student.to(CPU)
    samples.check(student.network.input_shape)
    proto, integers, stored, outputs, names = to_onnx(student)
    network = student.network
    properties = {entry.key: entry.value for entry in proto.metadata_props} | {
        "dreamquant.bits": str(student.bits),
        "dreamquant.plan": student.plan.name,
        **network.space.properties(),
        **output_properties(network.outputs),
        **(metadata or {}),
    }
    if student.plan.target is not None:
        properties["dreamquant.target"] = f"{student.plan.name} ({student.plan.target.runtime})"
    helper.set_model_props(proto, properties)
    if proto.ByteSize() > LARGEST_PROTO:
        raise OutputError(f"cannot write {path}: the model takes {proto.ByteSize() / 1e9:.1f} GB and one ONNX file holds 2 GB")
    conformity = None if student.plan.target is None else require(proto, student.plan)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        verification = verify(student, temporary, network.space.snapped(samples.images), integers, stored, outputs)
    return Artifact(path, path.stat().st_size, verification, outputs, names, conformity)


def check_format(path: Path) -> None:
    """`OptionError` unless the path's suffix names a format that can be written."""
    if path.suffix != ".onnx":
        raise OptionError(f"the output is {path}; its suffix must tell the format (known: .onnx)")
