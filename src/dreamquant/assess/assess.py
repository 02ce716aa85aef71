"""Network + student + file + held-out samples -> what can be said of the result, and how it was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dreamquant.assess.agreement import Agreement, LayerError, agreement, layer_errors
from dreamquant.assess.latency import Latency, compare_latency
from dreamquant.assess.layer_times import LayerTime, layer_times
from dreamquant.assess.probes import Probe, probe
from dreamquant.assess.trust import Trust, against, beyond, trust, unlike
from dreamquant.devices import CPU
from dreamquant.exporters.export import Artifact
from dreamquant.exporters.onnx_emit import emit_network
from dreamquant.network.graph import Network
from dreamquant.network.scores import file_answers, float_answers
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner
from dreamquant.samples import Samples

LAYER_SAMPLES = 16
WORTH = 1.02  # times as fast as the float file: less is none that a user would notice, or timing can be sure of
COSTLY = 3  # layers that are named


@dataclass(frozen=True)
class Assessment:
    """`agreement` is between the float network and the exported file in ONNX Runtime, on held-out samples; sizes in bytes.

    `trust` is the loss of accuracy that the answers on probes tell; where it is None, `trust_unknown` says why, in sentences.
    `layer_times` are of a file that is not `fast`.
    """

    agreement: Agreement
    layers: list[LayerError]
    float_layers: list[str]
    float_size: int
    size: int
    latency: Latency
    probes: list[Probe] = field(default_factory=list)
    trust: Trust | None = None
    trust_unknown: list[str] = field(default_factory=list)
    layer_times: list[LayerTime] = field(default_factory=list)
    made_for: str = ""  # the runtime, where it is not ONNX Runtime, of which the times say nothing

    @property
    def fast(self) -> bool:
        """Whether the file is faster than the float file by more than what timing may be off, or made for another runtime."""
        return self.latency.ratio >= WORTH or bool(self.made_for)

    def too_slow(self) -> str:
        """That the file is no faster than the float file, and which layers cost most; empty where it is."""
        if self.fast:
            return ""
        costly = [str(one) for one in self.layer_times if one.ms > one.float_ms][:COSTLY]
        most = f"; most beyond the float file take {', '.join(costly)}" if costly else ""
        return f"no faster than the float file: {self.latency.ratio:.2f} times as fast{most}"


def assess(
    network: Network,
    student: Student,
    artifact: Artifact,
    held_out: Samples,
    probes: Sequence[Samples] = (),
    *,
    learned: bool = False,
    unasked: str = "This run was asked for no estimate.",
) -> Assessment:
    """Agreement of every output on samples that set no range, SQNR of each layer, and size and latency of the file against the
    float network's own ONNX file, both run alternately in ONNX Runtime on one thread.

    With the `probes` of `assess.probes` there is an estimate of the accuracy that is lost, where one can be told; `learned` says
    that rounding or weights were learnt on images, `unasked` why there are no probes. All of it is measured on the processor.
    """
    network, student = network.to(CPU), student.to(CPU)
    expected = float_answers(network, held_out.images)
    runner = onnx_runner(artifact.path, shown=artifact.outputs)
    actual = file_answers(network, runner, held_out.images)
    answers = [probe(network, runner, samples) for samples in probes]
    target = artifact.conformity
    made_for = "" if target is None or target.proven else target.runtime
    with tempfile.TemporaryDirectory() as folder:
        reference = float_file(network, Path(folder))
        latency = timed(network, reference, artifact.path)
        slow = latency.ratio < WORTH and not made_for
        times = layer_times(network, student, reference, artifact.path, artifact.values) if slow else []
        size = reference.stat().st_size
    agreed = agreement(network.outputs, expected, actual)
    unknown = unlike(network) or (beyond(answers) if answers else [unasked])
    told = None if unknown else trust(answers, learned=learned)
    unknown = unknown if told is None else against(told, agreed)
    return Assessment(
        agreement=agreed,
        layers=layer_errors(student, held_out.images[:LAYER_SAMPLES]),
        float_layers=student.float_layers(),
        float_size=size,
        size=artifact.size,
        latency=latency,
        probes=answers,
        trust=None if unknown else told,
        trust_unknown=unknown,
        layer_times=times,
        made_for=made_for,
    )


def timed(network: Network, reference: Path, path: Path) -> Latency:
    """Time of a float file of the network and of another of its files, in turns, on batches that both take."""
    batch = network.batch or onnx_runner(path).batch or onnx_runner(reference).batch or 1
    return compare_latency(reference, path, input_shape=network.input_shape, batch=batch, layout=network.space.layout)


def float_file(network: Network, folder: Path) -> Path:
    """The float network as an ONNX file: its own, or one written into `folder`."""
    if network.source.kind == "onnx" and network.source.path is not None:
        return network.source.path
    path = folder / "float.onnx"
    path.write_bytes(emit_network(network).SerializeToString())
    return path
