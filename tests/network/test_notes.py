"""What is known of nodes: copies of a graph hand it on, and only one module knows where it is kept."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dreamquant
from dreamquant.network.graph import Network, input_node
from dreamquant.network.notes import exported_value, is_tensor, note_value, notes, set_notes, shape_of

ROOT = Path(dreamquant.__file__).parent


def test_copies_have_notes_of_their_own(residual: Network) -> None:
    again = copy.deepcopy(residual.graph)
    before, node = notes(input_node(residual.graph.graph)), input_node(again.graph)
    assert notes(node) == before
    set_notes(node, replace(notes(node), origin="other"))
    assert notes(node).origin == "other"
    assert notes(input_node(residual.graph.graph)) == before


def test_only_tensors_have_a_shape() -> None:
    node = torch.fx.Graph().placeholder("x")
    note_value(node, (torch.zeros(2), 3))
    assert not is_tensor(node)
    with pytest.raises(AssertionError):
        shape_of(node)
    note_value(node, torch.zeros(2, 3))
    assert shape_of(node) == (2, 3)


def test_what_others_left_is_dropped() -> None:
    node = torch.fx.Graph().placeholder("x")
    set_notes(node, replace(notes(node), origin="x"))
    node.meta["val"] = 3
    assert exported_value(node) == 3
    set_notes(node, notes(node))
    assert exported_value(node) is None
    assert notes(node).origin == "x"


def test_no_other_module_knows_where_notes_are_kept() -> None:
    reads = {
        path
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if getattr(node, "attr", "") == "meta"
    }
    assert reads == {ROOT / "network" / "notes.py"}
