"""Every allocation method keeps the contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.allocation import allocate
from dreamquant.errors import DataError, OptionError
from dreamquant.methods import method_names
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.notes import notes
from dreamquant.quantization.plan import Plan, load_plan
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import weighted_nodes
from dreamquant.samples import Samples

OPTIONS: dict[str, dict[str, Any]] = {"mixed": {"choices": "3,4,8"}, "auto": {"agreement": 90.0, "kl": 1.6e-3}}
METHODS = method_names("allocation")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def samples(calibration: Samples) -> Samples:
    return Samples(calibration.images[:12])


def plans(network: Network, samples: Samples, method: str, plan: str | Plan = "deploy", bits: str = "W4A8") -> Any:
    return allocate(network, samples, plan, bits=bits, method=method, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("plan", ["deploy", "zeroq", "brecq"])
def test_the_plan_that_comes_out_is_one_to_quantize_with(residual: Network, samples: Samples, method: str, plan: str) -> None:
    allocation = plans(residual, samples, method, plan)
    student = quantize(residual, samples, bits="W4A8", plan=allocation.plan)
    layers = [node.name for node in weighted_nodes(residual.graph.graph)]

    assert bool(student(samples.images).isfinite().all())
    assert set(allocation.plan.layers) <= set(layers)
    assert [row["layer"] for row in allocation.layers] == ([] if method == "uniform" else layers)
    assert allocation.plan.model_copy(update={"layers": {}}) == load_plan(plan)
    json.dumps({"layers": allocation.layers, **allocation.totals}, allow_nan=False)


def test_network_and_samples_are_left_as_they_were(residual: Network, samples: Samples, method: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in residual.graph.named_buffers()}
    code, state = residual.graph.code, torch.random.get_rng_state()
    metas = {node.name: notes(node) for node in residual.graph.graph.nodes}
    images, plan = samples.images.clone(), load_plan("deploy")
    plans(residual, samples, method, plan)

    assert residual.graph.code == code
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in residual.graph.named_buffers())
    assert {node.name: notes(node) for node in residual.graph.graph.nodes} == metas
    assert torch.equal(samples.images, images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert plan == load_plan("deploy")


def test_the_same_samples_give_the_same_plan(residual: Network, samples: Samples, method: str) -> None:
    one, other = (plans(residual, samples, method, "zeroq") for _ in range(2))

    assert one == other


def test_a_plan_with_layers_of_its_own_is_taken_further(residual: Network, samples: Samples, method: str) -> None:
    plan = load_plan("zeroq", layers={"conv2d_3": {"keep_float": True}})
    allocation = plans(residual, samples, method, plan)

    assert allocation.plan.layer("conv2d_3").keep_float
    assert quantize(residual, samples, plan=allocation.plan).float_layers().count("conv2d_3") == 1


def test_a_transformer_is_a_network_too(transformer: Network, images: Callable[..., Tensor], method: str) -> None:
    samples = Samples(images(6, transformer.input_shape))
    allocation = allocate(
        transformer, samples, bits="W4A8", method=method, **({"agreement": 50.0, "kl": 0.01} if method == "auto" else {})
    )

    assert bool(quantize(transformer, samples, bits="W4A8", plan=allocation.plan)(samples.images).isfinite().all())


def test_a_network_without_any_layer_has_nothing_to_decide(images: Callable[..., Tensor], method: str) -> None:
    network = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), (3, 4, 4))
    allocation = plans(network, Samples(images(4, (3, 4, 4))), method)

    assert allocation.plan.layers == {}
    assert allocation.layers == []


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"uniform"}))
def test_what_does_not_fit_is_refused(residual: Network, method: str) -> None:
    for shape in ((2, 3, 4, 4), (0, 3, 11, 9)):
        with pytest.raises(DataError, match=r"the network takes \(N, 3, 11, 9\)"):
            plans(residual, Samples(torch.zeros(shape)), method)


def test_unknown_options_are_refused(residual: Network, samples: Samples, method: str) -> None:
    with pytest.raises(OptionError, match="unknown option of allocation method"):
        allocate(residual, samples, method=method, banana=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "speed"}, "unknown hybrid.mode 'speed'"),
        ({"threshold": float("inf")}, "hybrid.threshold is inf"),
        ({"threshold": float("nan")}, "hybrid.threshold is nan"),
        ({"tolerance": -0.1}, "hybrid.tolerance is -0.1"),
        ({"tolerance": float("nan")}, "hybrid.tolerance is nan"),
    ],
)
def test_impossible_options_of_hybrid_are_refused(
    residual: Network, samples: Samples, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        allocate(residual, samples, method="hybrid", **options)
