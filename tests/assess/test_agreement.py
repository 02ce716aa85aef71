"""Agreement and layer errors against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dreamquant.assess.agreement import Agreement, layer_errors
from dreamquant.assess.agreement import agreement as agreements
from dreamquant.network import live
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.outputs import CLASSES, DENSE, STATED, Output
from dreamquant.network.scores import float_answers
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import prepare
from dreamquant.samples import Samples


def agreement(expected: Tensor, actual: Tensor) -> Agreement:
    """Of one output of classes, or of classes of each pixel."""
    shape = tuple(expected.shape[1:])
    output = Output("output", CLASSES if len(shape) == 1 else DENSE, STATED, "", 0, shape, form="logits")
    return agreements([output], [expected], [actual])


def test_agreement_counts_equal_top_classes() -> None:
    expected = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    actual = torch.tensor([[0.0, 9.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.1]])
    found = agreement(expected, actual)

    assert found.samples == 3
    assert found.top1 == pytest.approx(200 / 3)


def test_kl_is_the_divergence_of_the_softmaxes_in_nats() -> None:
    expected, actual = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)

    assert agreement(expected, actual).kl == pytest.approx(wanted, rel=1e-5)
    assert agreement(expected, expected).kl == pytest.approx(0.0, abs=1e-7)
    assert agreement(expected, expected).top1 == 100.0


def test_kl_does_not_know_of_a_constant_added_to_all_scores() -> None:
    one = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    other = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))

    assert agreement(one, other + 40).kl == pytest.approx(agreement(one, other).kl, rel=1e-4)


def test_maps_of_classes_count_every_place() -> None:
    expected = torch.zeros(2, 3, 2, 2)
    expected[:, 1] = 1
    actual = expected.clone()
    actual[0, 2, 0, 0] = 5

    assert agreement(expected, actual).top1 == pytest.approx(700 / 8)


def test_layers_are_told_in_order_and_err_less_with_more_bits(residual: Network, calibration: Samples) -> None:
    images = calibration.images[:8]
    eight, four = (layer_errors(quantize(residual, calibration, bits=bits), images) for bits in ("W8A8", "W4A4"))
    names = [layer.layer for layer in eight]

    assert len(names) == len(set(names)) == 9
    order = [node.name for node in residual.graph.graph.nodes]
    assert names == sorted(names, key=order.index)
    assert all(one.sqnr > other.sqnr for one, other in zip(eight[1:], four[1:], strict=True))
    assert min(layer.sqnr for layer in eight) > 15


def test_sqnr_is_power_over_power_of_the_difference_to_the_float_network() -> None:
    network = capture(nn.Conv2d(3, 4, 3).eval(), (3, 6, 5))
    images = torch.randn(5, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    student = quantize(network, Samples(images), bits="W4A4", plan="zeroq", bias_correction="samples")
    (layer,) = layer_errors(student, images)
    expected = network(images)
    wanted = 10 * torch.log10(expected.square().sum() / (student(images) - expected).square().sum())

    assert layer.sqnr == pytest.approx(wanted.item(), abs=1e-2)


def test_without_grids_there_is_no_error(residual: Network, calibration: Samples) -> None:
    student, _, _ = prepare(residual, load_plan("deploy"), parse_bits("W8A8"))

    assert min(layer.sqnr for layer in layer_errors(student, calibration.images[:3])) > 200


def test_a_network_of_one_batch_size_is_measured_on_any_number_of_images() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(20 * x.reshape(6, -1).softmax(0).reshape(2, 3, 5, 4)).amax((2, 3))
            return y

    network = capture(torch.export.export(Bound().eval(), (torch.zeros(2, 3, 5, 4),)))
    assert network.batch == 2
    images = torch.randn(5, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    student = quantize(network, Samples(images))

    assert len(layer_errors(student, images)) == 1
    assert float_answers(network, images)[0].shape == (5, 4)


@pytest.mark.parametrize("images", [1, 7, 100])
def test_float_answers_do_not_depend_on_the_pieces(
    residual: Network, calibration: Samples, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "WORKING", images * live.live_bytes(residual.graph.graph) // 2)  # shapes are of two images
    answers = float_answers(residual, calibration.images)[0]

    assert live.at_once(residual, 1000) == images
    torch.testing.assert_close(answers, residual(calibration.images), rtol=1e-4, atol=1e-5)
