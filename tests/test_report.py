"""The report: what it says of a result, that its page works in a browser, and that nothing from a model becomes markup."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from markupsafe import Markup
from playwright.sync_api import Browser, Page, sync_playwright
from torch import nn

from dreamquant.assess.agreement import Agreement, agreement
from dreamquant.assess.probes import Probe
from dreamquant.assess.trust import Trust
from dreamquant.errors import ModelError
from dreamquant.flow import Result, run
from dreamquant.network.graph import Network, tensor_of
from dreamquant.network.outputs import CLASSES, STATED, Output
from dreamquant.quantization.codebook import Codebook
from dreamquant.quantization.grid import FakeQuantize, Grid
from dreamquant.quantization.quantize import quantize
from dreamquant.recipe import Recipe, load_recipe, recipe_names, resolve
from dreamquant.report import figures, write_report
from dreamquant.report.again import SAVED, command_again, on_lines, recipe_toml
from dreamquant.report.distributions import Histogram, channel_errors, close_ups, weight_panel
from dreamquant.report.facts import gather
from dreamquant.report.layers import LayerRow, grid_at, weight_quantizer, worst_first
from dreamquant.report.tables import Table, allocation_table, layer_table
from dreamquant.report.verdict import BAD, GOOD, OPEN, verdict
from dreamquant.report.words import DASH, STAY, number, percent, seconds, tenths
from dreamquant.samples import Samples

FEW = ["synthesis.count=16", "synthesis.held_out=8", "synthesis.steps=3"]
PLAIN = ["reconstruction.method=nearest"]
PROBES = [Probe("fractal", 256, 96.1, 0.021, 3.2, 0.41, 0.83), Probe("anchored", 32, 93.8, 0.034, 4.1, 0.62, 0.91)]
TRUST = Trust(drop=0.4, low=0.1, high=0.9, level=90.0, cases=84, networks=7)
LOSS = replace(TRUST, drop=8.0, low=3.0, high=14.0)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = "<script>window.taken = 1</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[[str], Result]:
    """Results by what they are for, each made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    learned = ["reconstruction.method=qdrop", "reconstruction.steps=4"]
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "learned": ("digits.pt2", {"bits": "W4A4", "settings": [*FEW, *learned]}),
        "hybrid": ("digits.pt2", {"bits": "W4A4", "recipe": "rsd_hybrid", "budget": "paper", "settings": FEW}),
        "mixed": ("digits.pt2", {"recipe": "zeroq_mixed", "settings": FEW}),
        "codebook": ("digits.pt2", {"recipe": "rsd_nonuniform", "settings": FEW}),
        "folded": ("digits_bnfolded.onnx", {"settings": [*FEW[:2], "quantization.layers.conv2d_3.keep_float=true"]}),
    }

    def find(name: str) -> Result:
        if name not in done:
            model, options = asked[name]
            output = folder / f"{name}.onnx"
            done[name] = run(digits / model, output, **{"budget": "quick", "estimate": False, **options})
        return done[name]

    return find


def told(result: Result, trust: Trust | None, *why: str) -> Result:
    unknown = list(why) if why or trust else result.assessment.trust_unknown
    return replace(
        result, assessment=replace(result.assessment, trust=trust, probes=PROBES if trust else [], trust_unknown=unknown)
    )


def on_noise(module: nn.Module, output: Path, shape: tuple[int, int, int], *, estimate: bool = False) -> Result:
    """A result at once: the images are noise, and few."""
    return run(module, output, input_shape=shape, pixels="none", settings=[*FEW[:2], "synthesis.method=noise"], estimate=estimate)


# ---- words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.01234, "0.0123"),
        (0.00001234, "1.23·10⁻⁵"),
        (-0.00001234, "−1.23·10⁻⁵"),
        (123456.0, "123,456"),
        (999.96, "1,000"),
        (None, DASH),
        (float("inf"), "∞"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.0004, "less than 0.1 %"), (0.9996, "more than 99.9 %"), (0.937, "93.7 %"), (0.184, "18 %")],
)
def test_percent_says_neither_all_nor_nothing_of_what_comes_near(share: float, text: str) -> None:
    assert percent(share) == text.replace(" %", f"{STAY}%")


def test_losses_and_durations() -> None:
    assert [tenths(value) for value in (-0.04, 0.44, -1.25, 17.3)] == [f"{text}{STAY}%" for text in ("0.0", "0.4", "−1.2", "17")]
    assert [seconds(value) for value in (0.05, 12.4, 200.0)] == [
        f"0.05{STAY}s",
        f"12{STAY}s",
        f"3{STAY}min 20{STAY}s",
    ]


# ---- verdict


@pytest.mark.parametrize(
    ("change", "tone", "says"),
    [
        ({}, GOOD, "Little is lost: about 0.4 % of the float network's right answers by the estimate; more than 0.9 %"),
        ({"drop": 0.0}, GOOD, "next to none of the float network's right answers"),
        ({"high": 2.4}, OPEN, "Little should be lost, though that is not certain: about 0.4 %"),
        ({"drop": 2.5, "high": 6.0}, OPEN, "Some accuracy is lost: about 2.5 % .* and 6.0 % are possible"),
        ({"drop": 8.0, "high": 14.0}, BAD, "Much is lost: about 8.0 % .* and 14 % are possible"),
        ({"drop": 38.0, "high": 61.0}, BAD, "Do not use this file as it is: about 38 %"),
        ({"drop": 2.2, "high": 28.0}, OPEN, "Measure before you use this file: about 2.2 % .* so wide that 28 % are possible"),
    ],
)
def test_verdict_of_an_estimate(change: dict[str, Any], tone: str, says: str, runs: Callable[[str], Result]) -> None:
    assessment = replace(runs("learned").assessment, agreement=Agreement(32, 100.0, 0.01), trust=replace(TRUST, **change))
    found = verdict(assessment)
    assert found.tone == tone
    assert re.match(f".*{says}", found.lost.replace(STAY, " "))
    assert f"{percent(assessment.size / assessment.float_size)} of the size" in found.gained


@pytest.mark.parametrize(
    ("answers", "trust", "tone", "says"),
    [
        (Agreement(16, 100.0, 0.01), None, OPEN, "on all 16 held-out images; what accuracy it has is not estimated"),
        (Agreement(32, 93.75, 0.05), None, OPEN, "It gives another answer than the float network on 6.2 % of 32"),
        (Agreement(32, 75.0, 0.5), None, BAD, "A loss of accuracy must be expected: it gives another answer .* 25 %"),
        (Agreement(32, 25.0, 2.0), None, BAD, "Do not use this file as it is: it gives another answer .* 75 %"),
        (Agreement(16, 50.0, 0.03, cost=2.0), None, OPEN, "50 % of 16 held-out images, of which that one was not sure"),
        (Agreement(32, 100.0, 0.0, confidence=0.97), TRUST, GOOD, r"Little .* on all 32 .* \(its mean confidence: 0.97\)\."),
        (
            Agreement(32, 100.0, 0.0),
            LOSS,
            BAD,
            "Much is lost: .* the file gives .* on all 32 .* like those that it was calibrated on",
        ),
        (
            Agreement(16, 50.0, 0.03, cost=2.0),
            TRUST,
            GOOD,
            "Little .*; the file gives another answer on 8 of 16 .* not sure of its own",
        ),
        (Agreement(32, 96.875, 0.1, cost=2.5), TRUST, GOOD, "Little .*; .* on 1 of 32 .* within what the estimate allows"),
    ],
)
def test_verdict_weighs_the_answers_on_dreams(
    answers: Agreement, trust: Trust | None, tone: str, says: str, runs: Callable[[str], Result]
) -> None:
    found = verdict(replace(runs("learned").assessment, agreement=answers, trust=trust))
    assert found.tone == tone
    assert re.match(f".*{says}", found.lost.replace(STAY, " "))


@pytest.mark.parametrize(
    ("quartiles", "says"),
    [
        ((1.3, 1.2, 1.4), "runs 1.3 times as fast"),
        ((0.5, 0.4, 0.9), "takes 2 times as long"),
        ((1.1, 0.9, 1.2), "runs about as fast"),
    ],
)
def test_speed_is_claimed_where_three_quarters_of_the_rounds_show_it(
    quartiles: tuple[float, float, float], says: str, runs: Callable[[str], Result]
) -> None:
    assessment = runs("learned").assessment
    ratio, low, high = quartiles
    latency = replace(assessment.latency, ratio=ratio, ratio_low=low, ratio_high=high)
    assert says in verdict(replace(assessment, latency=latency)).gained


def test_few_images_leave_much_possible() -> None:
    assert Agreement(32, 100.0, 0.0).interval == pytest.approx((89.28, 100.0), abs=1e-2)
    assert Agreement(16, 50.0, 0.0).interval == pytest.approx((28.00, 72.00), abs=1e-2)
    assert Agreement(16, 50.0, 0.0, "dense classes").interval is None


def test_what_another_answer_costs_is_what_the_network_was_sure_of() -> None:
    sure_scores = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    unsure = sure_scores / 100
    for scores, expected in ((sure_scores, True), (unsure, False)):
        found = agreement([Output("scores", CLASSES, STATED, "", 0, (2,), form="logits")], [scores], [scores.flip(1)])
        own = scores.softmax(1).amax().item()
        assert (found.top1, found.differing) == (0.0, 2)
        assert found.confidence == pytest.approx(own)
        assert found.cost == pytest.approx(100 * (2 * own - 1) / own)
        assert found.sure is expected
        assert "0.0 % top-1 (0 of 2, 0 to 66 %)" in found.outputs[0].text


# ---- figures


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-8.0, 7.5), (3e-7, 4e-7), (0.0, 12345.0), (1.0, 2.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = figures.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert f"{ticks[1] - ticks[0]:.3e}".partition("e")[0] in ("1.000", "2.000", "5.000")


def test_decades() -> None:
    assert figures.decades(0.005, 20.0) == [0.01, 0.1, 1.0, 10.0]
    assert len(figures.decades(0.2, 0.6)) > 1


def test_axis_by_logarithm() -> None:
    axis = figures.Axis(0.01, 100.0, 0.0, 40.0, log=True)
    assert [axis.at(value) for value in (0.01, 1.0, 100.0)] == pytest.approx([0.0, 20.0, 40.0])


def test_histogram_marks_what_is_cut_off() -> None:
    drawn = figures.histogram(Histogram(-2.0, 1.0, (0.1, 0.4, 0.4, 0.1), (-1.0, 1.0), (-0.5, 0.5)), "value", "title")
    inside, outside = re.search('class="bars" d="([^"]*)"', drawn), re.search('class="bars outside" d="([^"]*)"', drawn)
    assert inside is not None
    assert outside is not None
    assert inside[1].count("M") == outside[1].count("M") == 2
    levels = re.search('class="levels" d="([^"]*)"', drawn)
    assert levels is not None
    assert levels[1].count("M") == 2
    whole = figures.histogram(Histogram(-1.0, 1.0, (0.5, 0.5), (-1.0, 1.0)), "value", "title")
    assert "outside" not in whole


def test_the_chosen_point_lies_on_the_frontier() -> None:
    points = [(2.0, 1.0), (4.0, 0.1), (8.0, 0.001)]
    drawn = figures.frontier(points, (4.0, 0.1), "title")
    path = re.search('points="([^"]*)"', drawn)
    chosen = re.search('class="chosen" cx="([^"]*)" cy="([^"]*)"', drawn)
    assert path is not None
    assert chosen is not None
    assert path[1].split()[1] == f"{chosen[1]},{chosen[2]}"
    heights = [float(place.partition(",")[2]) for place in path[1].split()]
    assert heights == sorted(heights)  # less damage lies lower


@pytest.mark.parametrize(
    "draw",
    [
        lambda text: figures.histogram(Histogram(0.0, 1.0, (1.0,), (0.0, 1.0)), text, text),
        lambda text: figures.lines([figures.Line(text, (0.1, 0.2))], text, text, text),
        lambda text: figures.frontier([(2.0, 1.0)], (2.0, 1.0), text),
        lambda text: figures.interval(0.1, 0.4, 0.9, text),
    ],
)
def test_figures_take_text_as_text(draw: Callable[[str], Markup]) -> None:
    drawn = draw(NASTY + '" onload="x')
    assert "<script" not in drawn
    assert 'onload="' not in drawn
    assert "&lt;script&gt;" in drawn


# ---- distributions


def shares(result: Result, layer: str) -> tuple[Histogram, str]:
    node = next(node for node in result.student.network.graph.graph.nodes if node.name == layer)
    panel = weight_panel(result.student, node)
    assert panel is not None
    return panel.histogram, panel.caption


def test_weights_are_counted_by_the_levels_that_they_lie_at(runs: Callable[[str], Result]) -> None:
    found, caption = shares(runs("learned"), "conv2d_1")
    assert sum(found.shares) == pytest.approx(1.0)
    assert found.levels == tuple(range(-8, 8))
    assert found.ends == (-8.5, 7.5)
    assert "all 16 channels" in caption
    assert "The lines are the 16 levels" in caption


def test_eight_bits_are_too_many_lines(runs: Callable[[str], Result]) -> None:
    found, caption = shares(runs("learned"), "conv2d")
    assert not found.levels
    assert "The band is the range of the 256 levels" in caption


def test_one_grid_for_all_is_drawn_in_the_weights_own_unit(residual: Network, calibration: Samples) -> None:
    student = quantize(residual, calibration, bits="W3A8", plan="zeroq", weight_granularity="tensor")
    graph = student.network.graph
    layer = next(node for node in graph.graph.nodes if node.name == "conv2d_1")
    quantizer, panel = weight_quantizer(layer), weight_panel(student, layer)
    assert quantizer is not None
    assert panel is not None
    weight = tensor_of(graph, quantizer.all_input_nodes[0])
    assert panel.axis == "weight"
    assert len(panel.histogram.levels) == 8
    assert panel.histogram.low <= weight.min() <= weight.max() <= panel.histogram.high
    rounded = {round(value, 5) for value in grid_at(student, quantizer).fake(weight).flatten().tolist()}  # type: ignore[union-attr]
    assert rounded <= {round(level, 5) for level in panel.histogram.levels}


def test_a_codebook_is_drawn_by_its_worst_channel(runs: Callable[[str], Result]) -> None:
    found, caption = shares(runs("codebook"), "conv2d_2")
    worst = re.search(r"The 144 weights of channel (\d+), the worst of 16", caption)
    assert worst is not None
    grid = next(
        tensor.grid for tensor in runs("codebook").student.tensors() if str(tensor.node.target) == "stages_0_conv2_weight"
    )
    assert isinstance(grid, Codebook)
    assert found.levels == pytest.approx(sorted(set(grid.levels[int(worst[1])].tolist())))


def test_errors_are_those_of_channels() -> None:
    before = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 5.0], [6.0, 8.0], [0.0, 0.0]])
    assert channel_errors(before, after, 0).tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert channel_errors(before.T, after.T, 1).tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert channel_errors(before, after, None).tolist() == pytest.approx([1 / 125**0.5])


def test_inputs_are_held_against_their_grid(runs: Callable[[str], Result]) -> None:
    result = runs("learned")
    grid = next(tensor.grid for tensor in result.student.tensors() if str(tensor.quantizer.target) == "relu_1_grid")
    assert isinstance(grid, Grid)
    narrow = replace(grid, scale=grid.scale / 4)
    quantizer = result.student.network.graph.get_submodule("relu_1_grid")
    assert isinstance(quantizer, FakeQuantize)
    cut = []
    try:
        for one in (grid, narrow):
            quantizer.grid = one
            (found,) = close_ups(result.student, result.samples.images, ["conv2d_2"])
            assert found.inputs is not None
            drawn, ends = found.inputs.histogram, found.inputs.histogram.ends
            centres = [drawn.low + (place + 0.5) * drawn.width for place in range(len(drawn.shares))]
            cut.append(sum(share for share, centre in zip(drawn.shares, centres, strict=True) if centre > ends[1]))
            assert ends == pytest.approx((-0.5 * float(one.scale), 15.5 * float(one.scale)))
            assert sum(drawn.shares) == pytest.approx(1.0)
            assert "of the values are exactly 0 and not drawn" in found.inputs.caption
    finally:
        quantizer.grid = grid
    assert cut[0] < 0.05 < cut[1]


def test_a_float_layer_has_nothing_to_draw(runs: Callable[[str], Result]) -> None:
    result = runs("folded")
    node = next(node for node in result.student.network.graph.graph.nodes if node.name == "conv2d_3")
    assert weight_panel(result.student, node) is None


# ---- layers and tables


def test_layers_come_worst_first() -> None:
    rows = [
        LayerRow("float", "conv2d", note="float", sqnr=None),
        LayerRow("quiet", "conv2d", sqnr=30.0),
        LayerRow("loud", "conv2d", sqnr=3.0),
        LayerRow("small", "conv2d", weights=0.1, inputs=None, sqnr=1.0),
        LayerRow("large", "conv2d", weights=0.1, inputs=0.3, sqnr=50.0),
    ]
    assert [row.name for row in worst_first(rows)] == ["large", "small", "loud", "quiet", "float"]


def column(table: Table, name: str) -> list[str]:
    place = [one.name for one in table.columns].index(name)
    return [row[place].text for row in table.rows]


def test_what_a_layer_does_not_have_is_a_dash() -> None:
    table = layer_table([LayerRow("a", "linear", shape=(4, 3), weight_bits=4, weights=0.5), LayerRow("b", "matmul")])
    assert column(table, "weight") == ["4×3", DASH]
    assert column(table, "input alone") == [DASH, DASH]
    assert column(table, "sum") == ["0.5", DASH]
    assert table.columns[table.sorted or 0].name == "sum"
    assert layer_table([LayerRow("b", "matmul", sqnr=3.0)]).sorted is None  # what is not measured orders nothing


def test_layers_of_a_result(runs: Callable[[str], Result]) -> None:
    facts = gather(runs("folded"))
    names = column(facts.layers, "layer")
    assert len(names) == len(set(names)) == 10
    bits = dict(zip(names, column(facts.layers, "W bits"), strict=True))
    assert bits["conv2d_3"] == "float"
    assert set(bits.values()) == {"8", "float"}
    damage = [float(row[8].value) for row in facts.layers.rows if row[8].value is not None]
    assert damage == sorted(damage, reverse=True)
    assert len(damage) == 9
    assert names[-1] == "conv2d_3"
    assert all(row[9].value is not None for row in facts.layers.rows)
    assert "conv2d_3" in " ".join(facts.cautions)


def test_a_layer_under_another_name_is_told(runs: Callable[[str], Result]) -> None:
    result = runs("folded")
    student = replace(result.student, network=result.student.network.with_graph(copy.deepcopy(result.student.network.graph)))
    node = next(node for node in student.network.graph.graph.nodes if node.name == "conv2d_1")
    node.name = "conv2d_1_split"
    table = gather(replace(result, student=student)).layers
    found = {row[0].text: row for row in table.rows}
    assert len(found) == 11
    assert found["conv2d_1"][0].note == "not in the file under this name"
    assert [cell.text for cell in found["conv2d_1"][6:]] == [DASH] * 4
    assert found["conv2d_1_split"][8].text == DASH


def test_operators_of_a_mixed_bag(residual_module: nn.Module, tmp_path: Path) -> None:
    result = on_noise(residual_module, tmp_path / "out.onnx", (3, 11, 9))
    facts = gather(result)
    assert "depthwise conv2d" in column(facts.layers, "operator")
    assert "each scaled to its own range" in facts.about_pictures
    assert (
        facts.again == f"dreamquant.run(model, {str(tmp_path / 'out.onnx')!r}, recipe='recipe.toml', budget='paper', seed=0,"
        " input_shape=(3, 11, 9), pixels='none')"
    )
    (tmp_path / SAVED).write_text(facts.recipe)
    again = run(
        residual_module,
        tmp_path / "again.onnx",
        recipe=str(tmp_path / SAVED),
        budget="paper",
        input_shape=(3, 11, 9),
        pixels="none",
        estimate=False,
    )
    assert again.artifact.path.read_bytes() == result.artifact.path.read_bytes()


def test_products_of_activations_are_layers_without_weights(transformer_module: nn.Module, tmp_path: Path) -> None:
    table = gather(on_noise(transformer_module, tmp_path / "out.onnx", (3, 12, 8))).layers
    products = [row for row in table.rows if row[1].text in ("matmul", "bmm")]
    assert products
    assert all(row[2].text == row[3].text == DASH and row[9].value is not None for row in products)


def test_a_network_without_classes_and_colours(tmp_path: Path, fill: Callable[..., nn.Module]) -> None:
    module = fill(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)), (2, 8, 8))
    result = on_noise(module, tmp_path / "out.onnx", (2, 8, 8), estimate=True)
    facts = gather(result)
    assert facts.trust is None
    assert facts.trust_unknown == ("The network has no output of scores of classes, so that no answer can be right or wrong.",)
    assert "images of 2 channels are neither grey nor coloured" in facts.about_pictures
    assert not facts.pictures
    assert "classes" not in facts.dreams
    write_report(result, tmp_path / "out.html")
    assert "no estimate" in (tmp_path / "out.html").read_text()


def test_what_cannot_be_measured_is_told(runs: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ModelError("scores are not finite")

    monkeypatch.setattr("dreamquant.report.facts.sensitivities", fails)
    monkeypatch.setattr("dreamquant.report.facts.measure", fails)
    facts = gather(runs("learned"))
    assert facts.unweighed == facts.no_norms == "scores are not finite"
    assert set(column(facts.layers, "sum")) == {DASH}
    assert facts.close  # by what is left of their signal


@pytest.mark.parametrize(("name", "columns"), [("hybrid", {"choice"}), ("mixed", {"parameters", "W4, nats", "bits of weights"})])
def test_allocation(name: str, columns: set[str], runs: Callable[[str], Result]) -> None:
    result = runs(name)
    facts = gather(result)
    assert facts.allocation is not None
    assert len(facts.allocation.rows) == len(result.allocation.layers) == 10
    assert columns <= {one.name for one in facts.allocation.columns}
    assert bool(facts.frontier) == (name == "mixed")
    assert facts.totals


def test_nothing_allocated_is_no_table() -> None:
    assert allocation_table([]) is None


# ---- run it again


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("budget", ["quick", "paper"])
def test_a_recipe_comes_back_from_its_toml(name: str, budget: str) -> None:
    settings = ["quantization.layers.conv2d_1.weight_bits=6", "quantization.deviations=5.5", "quantization.transform_options={}"]
    recipe = resolve(load_recipe(name), has_batchnorm=True, budget=budget, settings=settings)
    back = resolve(Recipe(**tomllib.loads(recipe_toml(recipe))), has_batchnorm=True, budget="paper")
    assert back == recipe.model_copy(update={"published": []})


def test_toml_of_awkward_texts(runs: Callable[[str], Result]) -> None:
    recipe = runs("learned").recipe
    fields = recipe.quantization.model_dump() | {"layers": {"a.b 'c\" \\ \x7f\n<": {"weight_bits": 4}}, "deviations": 1e-5}
    changed = recipe.model_copy(update={"quantization": type(recipe.quantization)(**fields), "because": 'é "x"\t'})
    assert tomllib.loads(recipe_toml(changed))["quantization"] == fields
    assert tomllib.loads(recipe_toml(changed))["because"] == 'é "x"\t'


def test_commands_are_what_a_shell_takes() -> None:
    parts = ["dreamquant", "quantize", "my model.pt2", "-o", "a'b.onnx", "--mean=-0.5"]
    text = on_lines(parts)
    assert text.count("\n") == 2
    assert shlex.split(text.replace("\\\n", "")) == parts


@pytest.mark.parametrize("name", ["learned", "hybrid"])
def test_the_command_makes_the_same_file_again(
    name: str, runs: Callable[[str], Result], command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = runs(name)
    (tmp_path / SAVED).write_text(recipe_toml(result.recipe))
    program, *arguments = shlex.split(command_again(result).replace("\\\n", ""))
    assert program == "dreamquant"
    arguments[arguments.index("-o") + 1] = str(tmp_path / "again.onnx")
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, "--no-estimate", "--quiet").status == 0
    assert (tmp_path / "again.onnx").read_bytes() == result.artifact.path.read_bytes()


# ---- the command line


@pytest.mark.parametrize("options", [["--quiet"], ["--json", "--no-estimate"]])
def test_the_option_writes_a_report(options: list[str], command: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "out.onnx", tmp_path / "out.html"
    settings = [part for setting in FEW[:2] for part in ("--set", setting)]
    finished = command("quantize", digits / "digits_bnfolded.onnx", "-o", output, "--report", page, *settings, *options)
    assert (finished.status, finished.err) == (0, "")
    assert json.loads(finished.out)["file"] == str(output) if "--json" in options else "report" in finished.out
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.html"}
    text = page.read_text()
    assert f"--report {page}" in text  # the command, as it was called
    assert not re.search('(?:src|href)="(?!data:)', text)


def test_progress_is_told(runs: Callable[[str], Result], tmp_path: Path) -> None:
    heard: list[tuple[str, int, int, float]] = []
    write_report(runs("learned"), tmp_path / "out.html", progress=lambda *words: heard.append(words))
    assert {stage for stage, *_ in heard} == {"weighing layers for the report"}
    assert heard[-1][1] == heard[-1][2]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("out.htm", "its suffix must be .html"),
        ("out.onnx", "its suffix must be .html"),
        ("nowhere/out.html", "the folder {folder}/nowhere does not exist"),
        ("link.html", "it is the output {folder}/out.onnx as well"),
        ("model.html", "it is the input"),
    ],
)
def test_a_report_that_cannot_be_is_refused_before_the_work(
    place: str, says: str, command: Callable[..., Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "out.onnx")
    (tmp_path / "model.html").symlink_to(digits / "digits.pt2")
    worked: list[object] = []
    monkeypatch.setattr("dreamquant.cli.making.run", lambda *given, **_: worked.append(given))
    finished = command("quantize", digits / "digits.pt2", "-o", tmp_path / "out.onnx", "--report", tmp_path / place)
    assert finished.status == 2
    assert finished.err.count("\n") == 1
    assert says.format(folder=tmp_path) in finished.err
    assert not worked
    assert not (tmp_path / "out.onnx").exists()


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    place = shutil.which("chromium")
    if place is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=place, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(runs: Callable[[str], Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Reports by the names of their runs; `trusted` and `bad` are of the learned one with an estimate, `untold` why without."""
    folder = tmp_path_factory.mktemp("pages")
    bad = replace(TRUST, drop=38.0, low=20.0, high=61.0)

    def find(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            estimates: dict[str, Trust] = {"trusted": TRUST, "bad": bad}
            why = [f"unlike {NASTY}"] if name == "untold" else []
            result = told(runs("learned" if name in (*estimates, "untold") else name), estimates.get(name), *why)
            write_report(result, path, command=["dreamquant", "quantize", "digits.pt2", "-o", "out.onnx"])
        return path

    return find


def opened(browser: Browser, path: Path, *, width: int = 1280, scheme: Any = "light") -> tuple[Page, list[str]]:
    """A page, and what went wrong on it: messages, errors, and requests for anything but itself and its own data."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    allowed = (path.as_uri(), "data:image/png;base64,")
    page.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
    page.goto(path.as_uri())
    return page, wrong


NAMES = ["learned", "trusted", "bad", "hybrid", "mixed", "codebook", "folded"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1280, 375])
def test_page_is_quiet_and_fits(name: str, width: int, browser: Browser, pages: Callable[[str], Path]) -> None:
    page, wrong = opened(browser, pages(name), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    scroll, client = page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.clientWidth]")
    pictures = page.evaluate("Array.from(document.images, one => one.naturalWidth)")
    page.close()
    assert wrong == []
    assert scroll <= client <= width
    assert pictures == [16] * 16
    assert pages(name).stat().st_size < 400_000


@pytest.mark.parametrize("name", ["trusted", "mixed", "folded"])
def test_tables_sort_by_every_column_both_ways(name: str, browser: Browser, pages: Callable[[str], Path]) -> None:
    page, wrong = opened(browser, pages(name))
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    sorted_columns = 0
    for table in page.locator("table").all():
        headings = table.locator("thead th")
        before = sorted(table.locator("tbody th").all_inner_texts())
        for place in range(headings.count()):
            heading = headings.nth(place)
            ways = []
            for _ in range(2):
                heading.locator("button").click()
                ways.append(heading.get_attribute("aria-sort"))
                _check_order(table, place, heading.get_attribute("data-kind"), ways[-1])
                assert table.locator("th[aria-sort]").count() == 1
            assert set(ways) == {"ascending", "descending"}
            sorted_columns += 1
        assert sorted(table.locator("tbody th").all_inner_texts()) == before  # no row is lost
    page.close()
    assert wrong == []
    assert sorted_columns >= 12


def _check_order(table: Any, place: int, kind: str | None, way: str | None) -> None:
    cells = table.locator(f"tbody tr > :nth-child({place + 1})")
    if kind == "number":
        found = [
            None if value is None else float(value)
            for value in cells.evaluate_all("all => all.map(one => one.dataset.value ?? null)")
        ]
        known = [value for value in found if value is not None]
        assert known == sorted(known, reverse=way == "descending")
        assert found == known + [None] * (len(found) - len(known))  # what has no number stays last
    else:
        texts = [text.split("\n")[0].strip() for text in cells.all_inner_texts()]
        named = [text for text in texts if text != DASH]
        assert named == sorted(named, key=_natural, reverse=way == "descending")
        assert texts == named + [DASH] * (len(texts) - len(named))


def _natural(text: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", text.strip().lower())
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in parts if part]


def test_the_worst_layer_stands_first_and_the_keyboard_sorts(browser: Browser, pages: Callable[[str], Path]) -> None:
    page, _ = opened(browser, pages("learned"))
    table = page.locator("#layers table")
    assert table.locator("th[aria-sort]").inner_text().strip().startswith("sum")
    damage = [
        float(value) for value in table.locator("tbody td:nth-child(9)").evaluate_all("all => all.map(one => one.dataset.value)")
    ]
    assert damage == sorted(damage, reverse=True)
    button = table.locator("thead th:nth-child(10) button")
    button.focus()
    page.keyboard.press("Enter")
    assert button.locator("..").get_attribute("aria-sort") == "descending"
    _check_order(table, 9, "number", "descending")
    page.close()


def test_dark_and_light(browser: Browser, pages: Callable[[str], Path]) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page, wrong = opened(browser, pages("trusted"), scheme=scheme)
        look = "one => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color]"
        back, ink = (_brightness(text) for text in page.locator("body").evaluate(look))
        bars = page.locator("svg .bars").first.evaluate("one => getComputedStyle(one).fill")
        page.close()
        assert wrong == []
        assert abs(back - ink) > 0.6  # of what lies between black and white
        seen[scheme] = back, bars
    assert seen["light"][0] > 0.9
    assert seen["dark"][0] < 0.2
    assert seen["light"][1] != seen["dark"][1]


def _brightness(colour: str) -> float:
    red, green, blue, *_ = (float(part) for part in re.findall(r"[\d.]+", colour))
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_what_an_estimate_rests_on_is_told(browser: Browser, pages: Callable[[str], Path]) -> None:
    good, _ = opened(browser, pages("trusted"))
    text = good.locator("body").inner_text().replace(STAY, " ")
    assert "84 quantizations of 7 networks" in text
    assert "0.1 % to 0.9 % in 90 % of the cases" in text
    assert good.locator(".verdict.good").count() == 1
    good.close()
    bad, _ = opened(browser, pages("bad"))
    assert bad.locator(".verdict.bad h1").inner_text().startswith("Do not use this file as it is")
    bad.close()
    untold, _ = opened(browser, pages("untold"))
    assert untold.locator(".warnings li").inner_text() == f"unlike {NASTY}"
    assert "no estimate" in untold.locator(".tiles").inner_text()
    untold.close()
    none, _ = opened(browser, pages("learned"))
    assert "This run was asked for no estimate." in none.locator("#trust").inner_text()
    none.close()


def test_names_from_a_model_are_text(browser: Browser, digits: Path, tmp_path: Path) -> None:
    proto = onnx.load(digits / "digits_bnfolded.onnx")
    old = next(node for node in proto.graph.node if node.op_type == "Conv").input[1]
    new = f"</td>{NASTY}<img src=x onerror='window.taken = 2'>"
    for node in proto.graph.node:
        node.name = f"{node.name}{NASTY}"
        node.input[:] = [new if name == old else name for name in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    model = tmp_path / "<img src=x onerror=alert(1)>.onnx"
    onnx.save(proto, model)
    output = tmp_path / "<script>alert(2)<.onnx"
    result = run(model, output, settings=FEW[:2], estimate=False)
    path = tmp_path / "out.html"
    write_report(told(result, None, NASTY), path, command=["dreamquant", NASTY])
    page, wrong = opened(browser, path)
    text = page.locator("body").inner_text()
    shown = page.locator("#layers tbody th small").all_inner_texts()
    counts = page.evaluate("[document.scripts.length, window.taken ?? 0, document.querySelectorAll('[onerror]').length]")
    title = page.title()
    page.close()
    assert wrong == []
    assert counts == [1, 0, 0]
    assert new in shown
    assert title == "<script>alert(2)<.onnx: report"
    assert model.name in text
    assert NASTY in text


def test_paper_shows_everything(browser: Browser, pages: Callable[[str], Path]) -> None:
    page, wrong = opened(browser, pages("trusted"), scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("details:not([open])").count() == 0
    back = page.locator("body").evaluate("one => getComputedStyle(one).color")
    assert _brightness(back) < 0.2  # ink is dark on paper
    assert (
        page.evaluate("Array.from(document.querySelectorAll('.scroll'), one => one.scrollHeight - one.clientHeight)")
        == [0] * page.locator(".scroll").count()
    )
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == page.locator("details").count()
    page.close()
    assert wrong == []
