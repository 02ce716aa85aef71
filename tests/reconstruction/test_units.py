"""Units: every layer in one of them, and their outputs those of the network."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.notes import shape_of
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.quantization.walk import walk
from dreamquant.reconstruction._units import Unit, grouped, layer_units, segment_units
from dreamquant.samples import Samples


@pytest.fixture(scope="module")
def images_in(images: Callable[..., Tensor]) -> Tensor:
    return images(8, (3, 11, 9))


@pytest.fixture(scope="module")
def student(residual: Network, images_in: Tensor) -> Student:
    return quantize(residual, Samples(images_in), bits="W4A4", plan="brecq")


def test_a_step_leaves_nothing_behind(student: Student, images_in: Tensor) -> None:
    """What a unit computed is gone with its output: kept alive by a cycle, steps would add up until Python looks for cycles."""
    block = segment_units(student)[1]
    inner: list[weakref.ref[Tensor]] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inner.append(weakref.ref(x))
            return x

    x = torch.rand(len(images_in), *shape_of(block.input)[1:])
    gc.collect()
    gc.disable()
    try:
        block.run(x, dict.fromkeys(block.quantizers[1:], Seen()))
        assert [one() for one in inner] == [None] * (len(block.quantizers) - 1)
    finally:
        gc.enable()
    assert inner


@pytest.mark.parametrize("units", [segment_units, layer_units, lambda student: grouped(segment_units(student))])
def test_every_layer_is_in_one_unit(student: Student, units: Callable[[Student], list[Unit]]) -> None:
    layers = [node for node in student.network.graph.graph.nodes if is_call(node, WEIGHTED)]
    assert [layer for unit in units(student) for layer in unit.layers] == layers


def test_a_residual_block_is_one_unit_that_begins_with_its_inputs_quantizer(student: Student) -> None:
    sizes = [len(unit.layers) for unit in segment_units(student)]
    assert sizes == [1, 2, 2, 2, 1, 1]  # stem, block, two branches, gate, depthwise, head
    block = segment_units(student)[1]
    assert block.nodes[0].op == "call_module"
    assert block.nodes[0].all_input_nodes == [block.input]
    assert all(unit.nodes[-1].op != "call_module" for unit in segment_units(student))


@pytest.mark.parametrize("units", [segment_units, layer_units])
@pytest.mark.parametrize("exact", [True, False])
def test_units_compute_what_the_network_does(
    student: Student, images_in: Tensor, units: Callable[[Student], list[Unit]], exact: bool
) -> None:
    checked = []

    def during(unit: Unit, quantized: list[Tensor], floats: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        checked.append(unit)
        return [unit.run(value) for value in quantized], [unit.run(value, exact=True) for value in floats]

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    walk(student.network, images_in, after=lambda node, q, e: seen.update({node.name: (q[0].clone(), e[0].clone())}))
    again: dict[str, tuple[Tensor, Tensor]] = {}
    pieces = {unit.nodes[0]: unit for unit in units(student)}
    walk(
        student.network, images_in, pieces=pieces, during=during, after=lambda node, q, e: again.update({node.name: (q[0], e[0])})
    )
    assert len(checked) == len(pieces)
    for unit in pieces.values():
        source = seen.get(unit.input.name)
        if source is None:
            continue  # a quantizer's output or the image
        got = unit.run(source[1] if exact else source[0], exact=exact)
        torch.testing.assert_close(got, seen[unit.output.name][1 if exact else 0])


@pytest.mark.parametrize("head", [(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (nn.MaxPool2d(3), nn.Flatten(), nn.ReLU())])
def test_a_block_is_learnt_before_the_map_is_pooled_away(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor], head: tuple[nn.Module, ...]
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1), nn.ReLU(), *head, nn.Linear(4, 3))
    network = capture(fill(module, (3, 9, 9)), (3, 9, 9))
    student = quantize(network, Samples(images(4, (3, 9, 9))), bits="W4A4", plan="brecq")
    stem, block, last = segment_units(student)

    assert "pool" in stem.output.name  # a pooling that leaves a map stays with its layer
    assert block.output.name.startswith("relu")
    assert shape_of(block.output)[1:] == (4, 3, 3)
    assert last.input is block.output
    assert len(last.nodes) > len(head)


def test_a_depthwise_layer_is_grouped_with_the_one_behind_it(
    fill: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
    )
    network = capture(fill(module, (3, 9, 9)), (3, 9, 9))
    student = quantize(network, Samples(images(4, (3, 9, 9))), bits="W4A4", plan="brecq")

    assert [len(unit.layers) for unit in segment_units(student)] == [1, 1, 1, 1]
    assert [len(unit.layers) for unit in grouped(segment_units(student))] == [1, 2, 1]
