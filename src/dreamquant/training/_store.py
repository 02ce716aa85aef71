"""What a training leaves on disk: its whole state after an epoch, in one file that the next epoch replaces."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dreamquant.files import make_run_folder
from dreamquant.kept import keep, kept


class Checkpoint:
    """`training.safetensors` in `folder` (None: nowhere). `made_by` says what the run was; a file of another run is not taken."""

    def __init__(self, folder: Path | None, made_by: str) -> None:
        self.path = None if folder is None else folder / "training.safetensors"
        self.made_by = made_by
        if folder is not None:
            make_run_folder(folder)

    def keep(self, state: dict[str, Tensor]) -> None:
        """Write a state."""
        if self.path is not None:
            keep(self.path, state, self.made_by)

    def restore(self) -> dict[str, Tensor] | None:
        """The state that an earlier run with the same settings has written, if it has."""
        return None if self.path is None else kept(self.path, self.made_by)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter, under names."""
    return {
        f"{index}.{name}": value
        for index, parts in optimizer.state_dict()["state"].items()
        for name, value in parts.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Take up what `optimizer_state` gave."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, _, part = name.partition(".")
        parts.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
