"""Bits and plans are read, and what cannot be is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamquant.errors import OptionError
from dreamquant.methods import find_method
from dreamquant.quantization.plan import Bits, Plan, load_plan, parse_bits, plan_names


@pytest.mark.parametrize(("text", "weights", "activations"), [("W8A8", 8, 8), ("w4a8", 4, 8), (" W2A3 ", 2, 3), ("W6a5", 6, 5)])
def test_bits_are_read(text: str, weights: int, activations: int) -> None:
    bits = parse_bits(text)

    assert bits == Bits(weights=weights, activations=activations)
    assert parse_bits(str(bits)) == bits


@pytest.mark.parametrize("text", ["banana", "W8", "A8", "", "8", "W8A8A8", "WxAy", "W-4A8", "W4.5A8", "W8A8\nW4A4"])
def test_what_are_no_bits_is_named(text: str) -> None:
    with pytest.raises(OptionError, match=r"bits are .*write them as W8A8") as caught:
        parse_bits(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part", "number"),
    [("W9A4", "weights", 9), ("W4A9", "activations", 9), ("W1A8", "weights", 1), ("W8A0", "activations", 0)],
)
def test_impossible_bits_say_which(text: str, part: str, number: int) -> None:
    with pytest.raises(OptionError, match=f"'{text}': {number} bits for {part} is not possible; known: 2 to 8, or 16"):
        parse_bits(text)


@pytest.mark.parametrize("name", plan_names())
def test_shipped_plans_load_and_name_known_methods(name: str) -> None:
    plan = load_plan(name)

    assert plan.name == name
    assert plan.summary
    find_method("ranges", plan.weight_ranges).check_options(plan.weight_options)
    find_method("ranges", plan.activation_ranges).check_options(plan.activation_options)


def test_the_plans_of_the_design_ship() -> None:
    assert {"deploy", "zeroq", "brecq"} <= set(plan_names())


def test_fields_can_be_changed() -> None:
    plan = load_plan("deploy", weight_ranges="mse", first_weight_bits=None)

    assert plan.weight_ranges == "mse"
    assert plan.first_weight_bits is None
    assert plan.placement == load_plan("deploy").placement


def test_an_unknown_plan_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown plan 'deplyo'; did you mean 'deploy'") as caught:
        load_plan("deplyo")
    assert all(name in str(caught.value) for name in plan_names())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_range": "mse"}, "unknown option 'weight_range'; did you mean 'weight_ranges'"),
        ({"first_weight_bits": 9}, "first_weight_bits is 9"),
        ({"image_bits": 1}, "image_bits is 1"),
        ({"placement": "everywhere"}, "placement is 'everywhere'"),
        ({"bias": "perhaps"}, "bias is 'perhaps'"),
        ({"weight_options": 3}, "weight_options is 3"),
    ],
)
def test_impossible_fields_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        load_plan("deploy", **changes)
    assert str(caught.value).startswith("plan deploy: ")
    assert "\n" not in str(caught.value)


def test_a_field_called_name_is_a_field_like_others() -> None:
    assert load_plan("deploy", name="mine").name == "mine"


def test_a_plan_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\nplacement = "layer_inputs"\n')
    plan = load_plan(str(path))

    assert plan == Plan(name="mine", summary="mine", placement="layer_inputs")


@pytest.mark.parametrize("text", [b"summary = ", b"\xff\xfe\x00", b"", b"surprise = 1"])
def test_a_broken_file_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text)
    with pytest.raises(OptionError, match=r"broken\.toml") as caught:
        load_plan(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"absent\.toml"):
        load_plan(str(tmp_path / "absent.toml"))
