"""The best choice within a limit, against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from dreamquant.allocation._solver import Option, Term, cost, damage, solve

WIDTHS = (2, 3, 4, 8)


def problem(seed: int, decisions: int, inputs: int) -> tuple[list[list[Option]], list[Term]]:
    """Random damages that mostly fall with the width; some decisions meet others in the cost."""
    chance = random.Random(seed)
    options = [[Option(width, 10 ** chance.uniform(-3, 0) / width) for width in WIDTHS] for _ in range(decisions + inputs)]
    if seed % 3 == 0:  # ties
        options = [[Option(one.width, round(one.damage, 1)) for one in row] for row in options]
    terms = [
        Term(
            chance.choice([432, 640, 2304, 36864]),
            index,
            chance.choice([None, decisions + chance.randrange(inputs)]) if inputs else None,
        )
        for index in range(decisions)
    ]
    return options, terms


@pytest.mark.parametrize(("decisions", "inputs"), [(1, 0), (5, 0), (3, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_limit_does_less_damage(decisions: int, inputs: int, seed: int) -> None:
    options, terms = problem(seed, decisions, inputs)
    every = [(cost(choice, terms), damage(choice)) for choice in itertools.product(*options)]
    cheapest, dearest = min(every)[0], max(every)[0]
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        limit = round(cheapest + share * (dearest - cheapest))
        found = solve(options, terms, limit)
        assert found is not None
        assert cost(found, terms) <= limit
        assert damage(found) == pytest.approx(min(harm for price, harm in every if price <= limit), rel=1e-9)
    assert solve(options, terms, cheapest - 1) is None


def test_among_equal_damages_the_fewest_bits_are_taken() -> None:
    options = [[Option(width, harm) for width, harm in zip(WIDTHS, (1.0, 0.5, 0.5, 0.5), strict=True)] for _ in range(4)]
    found = solve(options, [Term(10, index) for index in range(4)], 10**6)

    assert found is not None
    assert [one.width for one in found] == [3, 3, 3, 3]


def test_a_limit_is_kept_to_the_last_unit() -> None:
    options = [[Option(2, 1.0), Option(3, 0.0)] for _ in range(3)]
    terms = [Term(10**9 + index, index) for index in range(3)]
    exactly = 2 * (10**9) + 3 * (10**9 + 1) + 3 * (10**9 + 2)
    for limit, widths in ((exactly, [2, 3, 3]), (exactly - 1, [3, 2, 3]), (exactly - 2, [3, 3, 2]), (exactly - 3, None)):
        found = solve(options, terms, limit)
        assert found is not None
        assert (sum(one.damage for one in found) == 1.0) == (widths is not None)
        if widths is not None:
            assert cost(found, terms) <= limit


def test_nothing_to_decide_costs_nothing() -> None:
    assert solve([], [], 0) == []


def test_a_hundred_decisions_are_still_decided() -> None:
    options, terms = problem(1, 100, 0)
    widths = [sum(term.count for term in terms) * width for width in (2, 3, 4, 6)]
    harms = [damage(solve(options, terms, limit) or []) for limit in widths]

    assert harms == sorted(harms, reverse=True)
    assert harms[0] > harms[1] > harms[3] > 0
