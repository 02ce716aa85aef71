"""One option for each of many decisions, at the least damage within a limit of cost: exactly, as a knapsack of choices.

Partial choices are extended decision by decision (dynamic programming). One is dropped where another costs no more and does no
more damage, where the limit cannot be kept any more, and where even the Lagrangian bound of what is left to decide makes it
worse than a choice that is known. Costs are whole numbers: what is left at the end is the optimum, and proven to be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-9  # of a sum of damages
FIRST_GAP = 64  # the part of the known gap between bound and optimum that is tried first
HALVINGS = 60  # of the interval of the multiplier


@dataclass(frozen=True)
class Option:
    """What a decision may take: `width` bits, which enter the cost, and the `damage` they do alone, in nats."""

    width: int
    damage: float


@dataclass(frozen=True)
class Term:
    """A part of the cost: `count` times the width of `decision` and, where there is one, times that of `other`.

    No decision stands on both sides.
    """

    count: int
    decision: int
    other: int | None = None


T = TypeVar("T", bound=Option)


def cost(choice: Sequence[Option], terms: Sequence[Term]) -> int:
    """What the options taken cost, exactly."""
    return sum(
        term.count * choice[term.decision].width * (1 if term.other is None else choice[term.other].width) for term in terms
    )


def damage(choice: Sequence[Option]) -> float:
    """The sum of the damages of the options taken, in nats."""
    return sum(option.damage for option in choice)


def solve(decisions: Sequence[Sequence[T]], terms: Sequence[Term], limit: int) -> list[T] | None:
    """The option of each decision that together do the least damage at a `cost` of at most `limit`; None where all cost more.

    Among choices of the same damage the cheapest is taken.
    """
    parts = _parts(decisions, terms)
    multiplier, known = _multiplier(parts, limit)
    if known is None:
        return None
    lowest = sum(min(case.bound(multiplier) for case in part) for part in parts) - multiplier * limit
    gap = (known - lowest) / FIRST_GAP
    while True:  # as if a choice this near to the bound were known, until there is one
        allowed = min(known, lowest + gap)
        states = _states(parts, len(decisions), multiplier, limit, allowed + ROUNDING * (known + multiplier * limit))
        if allowed == known or (len(states.cost) and states.damage.min() <= allowed):
            return [options[taken] for options, taken in zip(decisions, states.taken[states.damage.argmin()], strict=True)]
        gap *= 4


@dataclass(frozen=True)
class _Item:
    """A decision whose options' costs are settled."""

    decision: int
    costs: NDArray[np.int64]
    damages: NDArray[np.float64]


@dataclass(frozen=True)
class _Case:
    """Decisions that need not know of one another any more, once `settled` (decision, option), of so much damage, are."""

    settled: tuple[tuple[int, int], ...]
    damage: float
    items: list[_Item]

    def bound(self, multiplier: float) -> float:
        """The least of damage + multiplier x cost."""
        return self.damage + sum(float((item.damages + multiplier * item.costs).min()) for item in self.items)

    def least(self) -> int:
        return sum(int(item.costs.min()) for item in self.items)

    def at(self, multiplier: float) -> tuple[float, int]:
        """(damage, cost) of the options that make the bound."""
        taken = [int((item.damages + multiplier * item.costs).argmin()) for item in self.items]
        return (
            self.damage + sum(float(item.damages[one]) for item, one in zip(self.items, taken, strict=True)),
            sum(int(item.costs[one]) for item, one in zip(self.items, taken, strict=True)),
        )


@dataclass(frozen=True)
class _States:
    """Partial choices: cost (n,), damage (n,), the option taken of each decision (n, decisions)."""

    cost: NDArray[np.int64]
    damage: NDArray[np.float64]
    taken: NDArray[np.int8]

    def at(self, places: NDArray[np.int64]) -> _States:
        return _States(self.cost[places], self.damage[places], self.taken[places])


def _parts(decisions: Sequence[Sequence[Option]], terms: Sequence[Term]) -> list[list[_Case]]:
    """The problem in parts that share no term; of each, the cases of its second factors."""
    parts: list[set[int]] = []
    for one in [{index} for index in range(len(decisions))] + [{t.decision, t.other} for t in terms if t.other is not None]:
        met = [part for part in parts if part & one]
        parts = [part for part in parts if part not in met] + [one.union(*met)]
    return [_cases(decisions, sorted(part), [term for term in terms if term.decision in part]) for part in parts]


def _cases(decisions: Sequence[Sequence[Option]], part: list[int], terms: list[Term]) -> list[_Case]:
    factors = sorted({term.other for term in terms if term.other is not None})
    cases = []
    for settled in itertools.product(*(range(len(decisions[factor])) for factor in factors)):
        widths = {factor: decisions[factor][one].width for factor, one in zip(factors, settled, strict=True)}
        items = []
        for index in (index for index in part if index not in widths):
            each = sum(t.count * (1 if t.other is None else widths[t.other]) for t in terms if t.decision == index)
            damages = np.array([option.damage for option in decisions[index]])
            items.append(_Item(index, each * np.array([option.width for option in decisions[index]], np.int64), damages))
        pairs = tuple(zip(factors, settled, strict=True))
        cases.append(_Case(pairs, sum(decisions[factor][one].damage for factor, one in pairs), items))
    return cases


def _multiplier(parts: list[list[_Case]], limit: int) -> tuple[float, float | None]:
    """The multiplier of the cost where the Lagrangian bound is highest, and the least damage met within the limit on the way
    there; None where nothing keeps within it."""
    low, high = (
        0.0,
        1.0 + sum(max(case.damage + sum(item.damages.max() for item in case.items) for case in part) for part in parts),
    )
    known: float | None = None
    for multiplier in itertools.chain([high], itertools.repeat(None, HALVINGS)):
        middle = (low + high) / 2 if multiplier is None else multiplier
        found = [min(part, key=lambda case: case.bound(middle)).at(middle) for part in parts]
        if sum(one for _, one in found) <= limit:
            total = sum(one for one, _ in found)
            known, high = total if known is None else min(known, total), middle
        elif known is None:
            return high, None
        else:
            low = middle
    return high, known


def _states(parts: list[list[_Case]], decisions: int, multiplier: float, limit: int, allowed: float) -> _States:
    """All choices that may be the best of those within the limit, if that does no more damage than `allowed`."""
    bounds = [min(case.bound(multiplier) for case in part) for part in parts]
    least = [min(case.least() for case in part) for part in parts]
    states = _States(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, decisions), np.int8))
    for index, part in enumerate(parts):
        later = _Later(multiplier, limit - sum(least[index + 1 :]), allowed + multiplier * limit - sum(bounds[index + 1 :]))
        found = [_extended(states, case, later) for case in part]
        states = _States(
            np.concatenate([one.cost for one in found]),
            np.concatenate([one.damage for one in found]),
            np.concatenate([one.taken for one in found]),
        )
        states = states.at(_undominated(states.cost, states.damage))
    return states


@dataclass(frozen=True)
class _Later:
    """What the parts that follow leave: `cost` at most, and damage + multiplier x cost at most `bound`."""

    multiplier: float
    cost: int
    bound: float


def _extended(states: _States, case: _Case, later: _Later) -> _States:
    """The states with a case's decisions made, less those that cannot lead to the best choice."""
    taken = states.taken.copy()
    for decision, option in case.settled:
        taken[:, decision] = option
    states = _States(states.cost, states.damage + case.damage, taken)
    for index, item in enumerate(case.items):
        rest = _Case((), 0.0, case.items[index + 1 :])
        costs = np.add.outer(states.cost, item.costs).ravel()
        damages = np.add.outer(states.damage, item.damages).ravel()
        hopeful = damages + later.multiplier * costs <= later.bound - rest.bound(later.multiplier)
        kept = np.flatnonzero(hopeful & (costs <= later.cost - rest.least()))
        kept = kept[_undominated(costs[kept], damages[kept])]
        rows, options = np.divmod(kept, len(item.costs))
        taken = states.taken[rows]
        taken[:, item.decision] = options
        states = _States(costs[kept], damages[kept], taken)
    return states


def _undominated(costs: NDArray[np.int64], damages: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places, by cost, of which each does less damage than all before."""
    order = np.lexsort((damages, costs))
    least = np.minimum.accumulate(damages[order])
    places: NDArray[np.int64] = order[np.append(True, damages[order][1:] < least[:-1])[: len(order)]]
    return places
