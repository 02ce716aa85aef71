"""Node by node over all samples, a network computes what it computes in one go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, output_nodes
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student, prepare
from dreamquant.quantization.walk import Chunks, walk
from dreamquant.samples import Samples


def walked(student: Student, images: Tensor, chunk: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Every node's value with quantizers and without."""
    found = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        found[node.name] = torch.cat(quantized), torch.cat(exact)

    walk(student.network, images, chunk=chunk, after=after)
    return found


def output(student: Student) -> str:
    return output_nodes(student.network.graph.graph)[0].name


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("plan", ["deploy", "zeroq", "brecq"])
def test_without_grids_both_are_the_float_network(residual: Network, calibration: Samples, plan: str, chunk: int) -> None:
    student, _, _ = prepare(residual, load_plan(plan), parse_bits("W4A4"))
    quantized, exact = walked(student, calibration.images, chunk)[output(student)]

    assert torch.equal(quantized, exact)
    torch.testing.assert_close(exact, residual(calibration.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("plan", ["deploy", "zeroq", "brecq"])
def test_with_grids_one_is_the_student_and_the_other_the_float_network(
    residual: Network, calibration: Samples, plan: str, chunk: int
) -> None:
    student = quantize(residual, calibration, bits="W4A4", plan=plan)
    images = calibration.images[:15]
    values = walked(student, images, chunk)
    quantized, exact = values[output(student)]

    torch.testing.assert_close(quantized, student(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact, residual(images), rtol=1e-4, atol=1e-4)
    assert not torch.equal(quantized, exact)


def test_the_first_layer_differs_by_its_weights_alone_where_the_image_is_float(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W2A8", plan="brecq", first_weight_bits=2)
    images = calibration.images[:5]
    quantized, exact = walked(student, images, 32)["conv2d"]
    layer = next(node for node in student.network.graph.graph.nodes if node.name == "conv2d")
    graph = student.network.graph
    weight, bias = (graph.get_buffer(str(node.target)) for node in (layer.args[1].args[0], layer.args[2]))
    coarse = graph.get_submodule(str(layer.args[1].target))(weight)

    torch.testing.assert_close(exact, nn.functional.conv2d(images, weight, bias, padding=1))
    torch.testing.assert_close(quantized, nn.functional.conv2d(images, coarse, bias, padding=1))


def test_before_sees_what_enters_a_quantizer(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W4A4")
    images, seen, values = calibration.images[:9], {}, {}

    def before(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        seen[node.all_input_nodes[0].name] = torch.cat(quantized), torch.cat(exact)

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        values[node.name] = torch.cat(quantized), torch.cat(exact)

    walk(student.network, images, chunk=4, before=before, after=after)
    activations = {tensor.node.name for tensor in student.tensors() if tensor.kind == "activation"}

    assert set(seen) == activations
    assert all(
        torch.equal(one, other) for name in activations & set(values) for one, other in zip(seen[name], values[name], strict=True)
    )


def test_what_after_writes_goes_on(residual: Network, calibration: Samples) -> None:
    student, _, _ = prepare(residual, load_plan("deploy"), parse_bits("W8A8"))
    seen: dict[str, Any] = {}

    def after(node: fx.Node, quantized: Chunks, exact: Chunks) -> None:
        if node.name == "conv2d":
            quantized[:] = [torch.zeros_like(value) for value in quantized]
        seen[node.name] = torch.cat(quantized), torch.cat(exact)

    walk(student.network, calibration.images[:3], chunk=2, after=after)
    assert not seen["relu"][0].any()
    assert bool(seen["relu"][1].any())


def test_values_of_several_tensors_are_walked_through() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).chunk(2, 1)
            token = torch.ones(1, 2, 1, 1).expand(x.shape[0], -1, 3, 5)
            y: Tensor = torch.relu(self.left(a)) + self.right(b) * token
            return y

    network = capture(Net().eval(), (3, 5, 7))
    images = torch.randn(5, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    student = quantize(network, Samples(images), bits="W8A8")
    quantized, exact = walked(student, images, 2)[output(student)]

    assert len(student.float_layers()) == 0
    torch.testing.assert_close(quantized, student(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact, network(images), rtol=1e-4, atol=1e-5)
