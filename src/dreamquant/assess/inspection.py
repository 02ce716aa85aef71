"""What is in a network: its layers, BatchNorms and segments, what a plan quantizes of it, and which methods can work on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dreamquant.allocation import LayerDamage
from dreamquant.methods import find_method, method_names
from dreamquant.network.attention import attentions
from dreamquant.network.graph import Network
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.network.outputs import Output
from dreamquant.network.segments import segments
from dreamquant.network.statistics import batch_norms
from dreamquant.quantization.plan import Bits, Plan
from dreamquant.quantization.sites import activation_sites
from dreamquant.quantization.student import transformed
from dreamquant.synthesis import lacking


@dataclass(frozen=True)
class Layer:
    """A layer with weights: its ATen operator, the shape of its weight, and that of its output for one image."""

    name: str
    operator: str
    weight: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """A BatchNorm."""

    name: str
    channels: int


@dataclass(frozen=True)
class Attention:
    """A self-attention over patches, by the tensor that it hands on."""

    output: str
    patches: int


@dataclass(frozen=True)
class Segment:
    """A piece of the network between two tensors, and the layers in it."""

    input: str
    output: str
    layers: list[str]


@dataclass(frozen=True)
class Site:
    """An activation that is quantized: to how many bits, and the tensor whose grid it lies on."""

    tensor: str
    bits: int
    grid_of: str


@dataclass(frozen=True)
class Inspection:
    """A network as it was loaded, and the `sites` that a plan quantizes of it.

    `remarks` say what is not as it was, `outputs` are its answers, of what kind each is and how that is known. `synthesis` is
    what each synthesis method would need that it does not have; empty where it can work. `sensitivity` is what each layer does
    to the answers by itself, the worst first; None where nobody asked.
    """

    model: str
    input_shape: tuple[int, int, int]
    batch: int | None
    remarks: tuple[str, ...]
    outputs: tuple[Output, ...]
    layers: list[Layer]
    batch_norms: list[Norm]
    attentions: list[Attention]
    segments: list[Segment]
    sites: list[Site]
    synthesis: dict[str, str]
    sensitivity: list[LayerDamage] | None = None

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON; of a synthesis method, whether it can work."""
        found = asdict(self) | {"synthesis": {name: not lack for name, lack in self.synthesis.items()}}
        if self.sensitivity is None:
            del found["sensitivity"]
        return found


def inspect(network: Network, plan: Plan, bits: Bits) -> Inspection:
    """What is in a network, and what `plan` quantizes of it with `bits`. Raises what `transformed` raises."""
    quantized = transformed(network, plan, bits)
    return Inspection(
        model=network.source.text,
        input_shape=network.input_shape,
        batch=network.batch,
        remarks=network.remarks,
        outputs=network.outputs,
        layers=[
            Layer(node.name, str(node.target), shape_of(node.args[1]), shape_of(node)[1:])
            for node in network.graph.graph.nodes
            if is_call(node, WEIGHTED)
        ],
        batch_norms=[Norm(norm.name, len(norm.mean)) for norm in batch_norms(network)],
        attentions=[Attention(layer.output.name, layer.patches) for layer in attentions(network)],
        segments=[
            Segment(segment.input.name, segment.output.name, [node.name for node in segment.layers])
            for segment in segments(network)
        ],
        sites=[Site(site.node.name, site.bits, site.root.name) for site in activation_sites(quantized.graph.graph, plan, bits)],
        synthesis={name: lacking(find_method("synthesis", name), network) for name in method_names("synthesis")},
    )
