"""Which tensors each plan quantizes, which of them share a grid, and on how many bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dreamquant.errors import OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, is_input
from dreamquant.network.operators import data_nodes
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.sites import Site, activation_sites, weighted_nodes
from dreamquant.quantization.student import prepare, transformed
from dreamquant.samples import Samples


def titles(graph: fx.Graph) -> dict[fx.Node, str]:
    """Data nodes by their operation and how many of its kind came before: conv2d#0, relu#0, conv2d#1, ..."""
    seen: Counter[str] = Counter()
    found = {}
    for node in data_nodes(graph):
        kind = "image" if is_input(node) else node.target.__name__.split(".")[0]  # type: ignore[union-attr]
        found[node] = f"{kind}#{seen[kind]}"
        seen[kind] += 1
    return found


def sites(network: Network, plan: str, bits: str = "W4A5", **changes: object) -> tuple[list[Site], dict[fx.Node, str]]:
    chosen = load_plan(plan, **changes)
    graph = transformed(network, chosen, parse_bits(bits)).graph.graph
    return activation_sites(graph, chosen, parse_bits(bits)), titles(graph)


def groups(network: Network, plan: str, **changes: object) -> set[frozenset[str]]:
    found, names = sites(network, plan, **changes)
    members: dict[fx.Node, set[str]] = {}
    for site in found:
        members.setdefault(site.root, set()).add(names[site.node])
    return {frozenset(group) for group in members.values()}


class Bordered(nn.Module):
    """An image that gets a border before the first layer, which no layer can add itself: it is no zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.first(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        return y


@pytest.mark.parametrize("whole", [True, False])
def test_an_image_that_stays_as_it_is_stays_so_with_a_border(whole: bool) -> None:
    found, names = sites(capture(Bordered(), (3, 6, 6)), "brecq", quantize_image=whole)
    assert ({"image#0", "pad#0"} & {names[site.node] for site in found} != set()) is whole


def widths(network: Network, plan: str, bits: str, **changes: object) -> dict[str, int]:
    found, names = sites(network, plan, bits, **changes)
    return {names[site.node]: site.bits for site in found}


def sets(*lines: str) -> set[frozenset[str]]:
    return {frozenset(line.split()) for line in lines}


def test_deploy_quantizes_whatever_an_integer_runtime_computes(residual: Network) -> None:
    assert groups(residual, "deploy") == sets(
        "image#0",
        "relu#0 max_pool2d#0",  # pooling keeps values
        "relu#1",  # merged into the convolution before it
        "conv2d#2",  # one side of the residual add
        "relu#2",  # merged into the add
        "conv2d#3",  # LeakyReLU is not merged
        "leaky_relu#0 relu#3 cat#0",  # a concatenation has one scale
        "mean#0",
        "relu#4",
        "conv2d#6",
        "sigmoid#0",
        "mul#0",
        "hardtanh#0",
        "adaptive_avg_pool2d#0 reshape#0",
    )


def test_deploy_can_leave_what_its_activation_function_follows_in_float(residual: Network) -> None:
    apart = groups(residual, "deploy") - groups(residual, "deploy", merge_activations=True)

    assert apart == sets("conv2d#3", "conv2d#6")


def test_zeroq_quantizes_the_outputs_of_activation_functions(residual: Network) -> None:
    assert groups(residual, "zeroq") == sets(
        "relu#0", "relu#1", "relu#2", "leaky_relu#0", "relu#3", "relu#4", "sigmoid#0", "hardtanh#0"
    )


def test_brecq_quantizes_inputs_of_layers_and_residual_identities(residual: Network) -> None:
    assert groups(residual, "brecq") == sets("max_pool2d#0", "relu#1", "relu#2", "mean#0", "relu#4", "mul#0", "reshape#0")


def test_brecq_quantizes_an_identity_that_no_layer_reads(images: Callable[..., Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            y: Tensor = self.last(F.gelu(x) + self.second(torch.sigmoid(x)))
            return y

    assert groups(capture(Net(), (3, 5, 7)), "brecq") == sets("gelu#0", "sigmoid#0", "add#0")


@pytest.mark.parametrize(
    ("plan", "eight"),
    [
        ("deploy", {"image#0", "adaptive_avg_pool2d#0", "reshape#0"}),
        ("brecq", {"max_pool2d#0", "reshape#0"}),
        ("zeroq", set()),
    ],
)
def test_exceptions_have_eight_bits(residual: Network, plan: str, eight: set[str]) -> None:
    found = widths(residual, plan, "W4A5")

    assert {name for name, bits in found.items() if bits == 8} == eight
    assert set(found.values()) - {8} == {5}


def test_a_shared_grid_has_the_most_bits_that_a_member_needs(residual: Network) -> None:
    found = widths(residual, "deploy", "W4A3", second_input_bits=7)

    assert found["relu#0"] == found["max_pool2d#0"] == 7
    assert found["relu#1"] == 3


class Chain(nn.Module):
    """Two residual adds; the second one's identity is read by a layer too, and behind it a pooling that an add reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, last = self.layers
        x = torch.relu(first(x))
        x = torch.relu(x + second(x))
        x = F.max_pool2d(x, 1) + third(x)
        y: Tensor = last(x)
        return y


def test_residual_adds_may_read_more_bits_than_layers() -> None:
    found, names = sites(capture(Chain(), (3, 6, 6)), "deploy", "W4A4", elementwise_bits=8)
    read = {(names[site.node], site.bits): {names.get(user, user.name) for user in site.users} for site in found}

    assert read == {
        ("image#0", 8): {"conv2d#0"},
        ("relu#0", 4): {"conv2d#1"},
        ("relu#0", 8): {"add#0"},
        ("conv2d#1", 8): {"add#0"},
        ("relu#1", 4): {"conv2d#2", "max_pool2d#0"},
        ("max_pool2d#0", 4): {"add#1"},  # has the values of a grid of 4 bits
        ("conv2d#2", 8): {"add#1"},
        ("add#1", 8): {"conv2d#3"},  # the last layer's input
        ("conv2d#3", 4): {"output"},
    }
    assert len({site.name for site in found}) == len(found) - 1  # the pooled values' grid is that of what was pooled


def test_functions_that_no_layer_merges_in_may_read_more_bits_too() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = self.layers
            y: Tensor = third(F.silu(second(F.leaky_relu(first(x)))))
            return y

    found, names = sites(capture(Leaky(), (3, 9, 9)), "deploy", "W4A4", elementwise_bits=8)
    assert {(names[site.node], site.bits) for site in found} == {
        ("image#0", 8),
        ("conv2d#0", 8),
        ("leaky_relu#0", 4),
        ("conv2d#1", 8),
        ("silu#0", 8),  # the last layer's input
        ("conv2d#2", 4),
    }


def test_sums_of_no_more_bits_than_layers_have_no_grid_of_their_own(residual: Network) -> None:
    found, _ = sites(residual, "deploy", "W4A8", elementwise_bits=8)
    assert not [site for site in found if site.name.endswith("_elementwise_grid")]


@pytest.mark.parametrize(("plan", "ends"), [("deploy", 8), ("brecq", 8), ("zeroq", 4)])
def test_first_and_last_weights(residual: Network, plan: str, ends: int) -> None:
    student, bits, _ = prepare(residual, load_plan(plan), parse_bits("W4A5"))
    layers = weighted_nodes(residual.graph.graph)
    weights = [bits[f"{layer.args[1].target}_grid"] for layer in layers]  # type: ignore[union-attr]

    assert len(weights) == 9
    assert weights == [ends, *[4] * 7, ends]
    assert student.float_layers() == []


def test_bits_that_are_asked_for_hold_for_the_rest(residual: Network) -> None:
    _, bits, _ = prepare(residual, load_plan("zeroq", first_weight_bits=6, last_weight_bits=7), parse_bits("W3A4"))
    layers = weighted_nodes(residual.graph.graph)

    assert [bits[f"{layer.args[1].target}_grid"] for layer in layers] == [6, *[3] * 7, 7]  # type: ignore[union-attr]


def test_products_of_activations_are_quantized_on_both_sides() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Conv2d(3, 12, 3, stride=3), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.embed(x).flatten(2).transpose(1, 2).split(4, -1)
            y: Tensor = self.mix(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
            return y

    network = capture(Attention(), (3, 9, 6))
    found, names = sites(network, "deploy")
    chosen = {site.node for site in found}
    products = [node for node in names if names[node].startswith("matmul")]

    assert len(products) == 2  # behind a split into three
    assert [layer.name for layer in weighted_nodes(network.graph.graph)] == ["conv2d", "linear"]
    assert all(source in chosen for product in products for source in product.all_input_nodes)


def test_the_output_of_the_last_layer_stays_float(residual: Network) -> None:
    for plan in ("deploy", "zeroq", "brecq"):
        found, names = sites(residual, plan)
        assert "linear#0" not in {names[site.node] for site in found}


def test_a_silu_counts_as_one_function_to_leave_a_convolution_to() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y: Tensor = self.second(x * torch.sigmoid(x))
            return y

    network = capture(Net(), (3, 5, 5))
    assert frozenset({"conv2d#0"}) in groups(network, "deploy")
    assert frozenset({"conv2d#0"}) not in groups(network, "deploy", merge_activations=True)


LAYERS = ["conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4", "conv2d_5", "conv2d_6", "conv2d_7", "linear"]


@pytest.mark.parametrize("plan", ["deploy", "brecq"])
def test_a_layer_kept_in_float_needs_no_grids(residual: Network, plan: str) -> None:
    whole, _, _ = prepare(residual, load_plan(plan), parse_bits("W4A5"))
    kept, bits, _ = prepare(residual, load_plan(plan, layers={"conv2d_2": {"keep_float": True}}), parse_bits("W4A5"))

    assert [node.name for node in weighted_nodes(whole.network.graph.graph)] == []
    assert kept.float_layers() == ["conv2d_2"]
    assert len([name for name in bits if "weight" in name]) == len(LAYERS) - 1
    before, after = (sets_of_sites(residual, plan, layers) for layers in ({}, {"conv2d_2": {"keep_float": True}}))
    assert before - after == {"relu#1"}  # its input; its output is one side of the residual add


@pytest.mark.parametrize("plan", ["deploy", "brecq", "zeroq"])
def test_all_layers_kept_in_float_leave_nothing_quantized(residual: Network, plan: str) -> None:
    layers = {name: {"keep_float": True} for name in LAYERS}
    student, bits, _ = prepare(residual, load_plan(plan, layers=layers), parse_bits("W4A5"))

    assert student.float_layers() == LAYERS
    assert all("weight" not in name and "bias" not in name for name in bits)


def sets_of_sites(network: Network, plan: str, layers: object) -> set[str]:
    found, names = sites(network, plan, layers=layers)
    return {names[site.node] for site in found}


def test_a_layers_own_bits_reach_its_weight_and_its_input(residual: Network) -> None:
    layers = {"conv2d_1": {"weight_bits": 3, "input_bits": 7}, "linear": {"weight_bits": 6}}
    assert widths(residual, "deploy", "W4A5", layers=layers)["max_pool2d#0"] == 7
    _, bits, _ = prepare(residual, load_plan("deploy", layers=layers), parse_bits("W4A5"))

    weights = [width for name, width in bits.items() if "weight" in name]
    assert weights == [8, 3, 4, 4, 4, 4, 4, 4, 6]  # the first layer's eight bits stay, the last one's are replaced


def test_a_tensor_that_two_layers_read_takes_the_more_bits(residual: Network) -> None:
    fewer = widths(residual, "brecq", "W4A5", second_input_bits=None, layers={"conv2d_3": {"input_bits": 3}})
    more = widths(residual, "brecq", "W4A5", second_input_bits=None, layers={"conv2d_3": {"input_bits": 7}})

    assert (fewer["relu#2"], more["relu#2"]) == (5, 7)  # conv2d_4 reads it too


def test_a_layer_that_is_not_there_is_answered_with_the_nearest(residual: Network) -> None:
    with pytest.raises(OptionError, match="unknown layer 'conv_1'; did you mean 'conv2d_1'"):
        prepare(residual, load_plan("deploy", layers={"conv_1": {"keep_float": True}}), parse_bits("W4A5"))


class Neck(nn.Module):
    """A tensor that two concatenations read, as in a path aggregation network, and one that is split again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.shared = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.last, self.part = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one, other, shared = (conv(x).relu() for conv in (self.one, self.other, self.shared))
        first, second = torch.cat([one, shared], 1), torch.cat([other, F.max_pool2d(shared, 1)], 1)
        return self.last(first), self.last(second), self.part(second[:, :4])


def test_a_shared_grid_is_decided_by_all_that_stand_on_it() -> None:
    network = capture(Neck(), (3, 6, 6))
    found, names = sites(network, "deploy")
    decided = {names[site.node]: {names[node] for node in site.deciders} for site in found}
    group = {"relu#0", "relu#1", "relu#2", "cat#0", "max_pool2d#0", "cat#1", "slice#0"}

    assert {name for name, deciders in decided.items() if deciders == {"cat#1", "relu#0", "relu#2"}} == group
    assert decided["image#0"] == {"image#0"}


@pytest.mark.parametrize("observe", ["float", "quantized"])
@pytest.mark.parametrize("largest", ["one", "other", "shared"])
def test_a_shared_grid_reaches_as_far_as_any_tensor_on_it(observe: str, largest: str) -> None:
    module = Neck().eval()
    with torch.no_grad():
        getattr(module, largest).weight.mul_(50)
    network = capture(module, (3, 6, 6))
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    student = quantize(
        network,
        Samples(images),
        plan="deploy",
        activation_ranges="minmax",
        observe=observe,
        bias_correction="none",
        effect_limit=None,
    )
    with torch.no_grad():
        ends = torch.stack([getattr(module, name)(images).max() for name in ("one", "other", "shared")])
    (grid,) = {tensor.grid for tensor in student.tensors() if tensor.quantizer.target == "cat_1_grid"}
    assert isinstance(grid, Grid)
    reach = ((grid.qmax - grid.zero_point) * grid.scale).item()
    assert reach == pytest.approx(ends.max().item(), rel=0.03)


def test_statistics_give_a_shared_grid_the_widest_range_too(fill: Callable[..., nn.Module]) -> None:
    class Normed(Neck):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.shared = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))

    module = fill(Normed(), (3, 6, 6))
    with torch.no_grad():
        module.one[1].weight.mul_(50)  # type: ignore[index, union-attr, operator]
    network = capture(module, (3, 6, 6))
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    student = quantize(network, Samples(images), plan="deploy", range_source="batchnorm", bias_correction="none")

    (grid,) = {tensor.grid for tensor in student.tensors() if tensor.quantizer.target == "cat_1_grid"}
    assert isinstance(grid, Grid)
    assert ((grid.qmax - grid.zero_point) * grid.scale).item() > 50
