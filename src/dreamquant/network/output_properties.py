"""What a file that was written from a network says of its outputs, so that it can be held against labels by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dreamquant.errors import ModelError, reason
from dreamquant.network.outputs import KINDS, Output

KEY = "dreamquant.outputs"  # a property of a model file


def properties(outputs: Sequence[Output]) -> dict[str, str]:
    """The outputs as a property of a file."""
    return {KEY: json.dumps([asdict(output) for output in outputs])}


def of_properties(given: Mapping[str, str], names: Sequence[str]) -> tuple[Output, ...] | None:
    """The outputs of these names, in this order, as a file's properties have them; None where these are silent or of others.

    `ModelError` for what is no such property.
    """
    found = _stored(given)
    return found if found and [output.name for output in found] == list(names) else None


def names_of(given: Mapping[str, str]) -> list[str]:
    """The names of the outputs that a file's properties tell of: inner values where a file has outputs whose sizes depend on
    values. `ModelError` for what is no such property."""
    return [output.name for output in _stored(given)]


def _stored(given: Mapping[str, str]) -> tuple[Output, ...]:
    try:
        return tuple(_output(**entry) for entry in json.loads(given.get(KEY, "[]")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"the property {KEY} is no list of outputs: {reason(error)}") from error


def _output(
    *,
    name: str,
    kind: str,
    known: str,
    why: str,
    axis: int | None,
    shape: Sequence[int],
    form: str,
    places: int,
    scores: Sequence[int],
    objectness: bool,
) -> Output:
    texts: list[Any] = [name, kind, known, why, form]
    numbers: list[Any] = [*shape, places, *scores, *([] if axis is None else [axis])]
    sound = all(isinstance(text, str) for text in texts) and all(type(number) is int and number >= 0 for number in numbers)
    if not sound or kind not in KINDS or not 0 < places <= max(len(shape), 1) or (scores and max(scores) >= shape[places - 1]):
        raise ValueError(f"{name!r} is said to be {kind!r} of shape {shape}")
    return Output(name, kind, known, why, axis, tuple(shape), form, places, tuple(scores), bool(objectness))
