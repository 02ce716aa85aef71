"""What is in a network, without the command line."""

from __future__ import annotations

import json
from dataclasses import replace

from dreamquant.allocation import LayerDamage
from dreamquant.assess.inspection import Inspection, Layer, Norm, Site, inspect
from dreamquant.methods import method_names
from dreamquant.network.graph import Network
from dreamquant.quantization.plan import load_plan, parse_bits


def found_in(network: Network, *, plan: str = "deploy", bits: str = "W8A8") -> Inspection:
    return inspect(network, load_plan(plan), parse_bits(bits))


def test_a_network_with_batchnorms(residual: Network) -> None:
    found = found_in(residual)
    assert found.input_shape == (3, 11, 9)
    assert found.layers[0] == Layer("conv2d", "aten.conv2d.default", (7, 3, 3, 3), (7, 11, 9))
    assert Norm("batch_norm", 7) in found.batch_norms
    assert not found.attentions
    assert {name for piece in found.segments for name in piece.layers} == {layer.name for layer in found.layers}
    assert list(found.synthesis) == method_names("synthesis")
    assert [name for name, lack in found.synthesis.items() if lack] == ["psaq"]


def test_a_network_with_attention(transformer: Network) -> None:
    found = found_in(transformer)
    assert [layer.patches for layer in found.attentions] == [6, 6]
    assert found.synthesis["psaq"] == ""
    assert "BatchNorm" in found.synthesis["zeroq"]


def test_sites_are_those_of_the_plan_and_the_bits(residual: Network) -> None:
    found = {plan: found_in(residual, plan=plan, bits="W4A5").sites for plan in ("deploy", "brecq")}
    assert found["deploy"] != found["brecq"]
    assert all(isinstance(site, Site) and site.bits in (5, 8) for sites in found.values() for site in sites)


def test_the_summary_is_json(residual: Network) -> None:
    found = found_in(residual)
    summary = json.loads(json.dumps(found.summary()))
    assert summary["layers"][0]["weight"] == [7, 3, 3, 3]
    assert summary["synthesis"]["rsd"] is True
    assert "sensitivity" not in summary
    ranked = replace(found, sensitivity=[LayerDamage("conv2d", 0.5, 0.25)]).summary()
    assert ranked["sensitivity"] == [{"layer": "conv2d", "weights": 0.5, "activations": 0.25}]
