"""Where a network computes: the processor, or a GPU that torch finds."""

from __future__ import annotations

import torch

from dreamquant.errors import OptionError

AUTO = "auto"
CPU = torch.device("cpu")
KNOWN = "cpu, cuda, cuda:N, auto"


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the first GPU, or the processor where there is none.

    `OptionError` for what is not known, or not present. Apple's `mps` is not known: it has no double precision, in which
    ranges and statistics are summed.
    """
    text = str(name).strip().lower()
    present = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if text == AUTO:
        return torch.device(present[min(1, len(present) - 1)])
    if text == "mps":
        raise OptionError(f"device mps has no double precision, which ranges and statistics need (present: {', '.join(present)})")
    kind, _, number = text.partition(":")
    if text != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or text.endswith(":")):
        raise OptionError(f"unknown device {str(name)!r} (known: {KNOWN}; present: {', '.join(present)})")
    found = "cpu" if text == "cpu" else f"cuda:{int(number or 0)}"
    if found not in present:
        raise OptionError(f"there is no device {text} here (known: {KNOWN}; present: {', '.join(present)})")
    return torch.device(found)


def device_name(device: torch.device) -> str:
    """A device in words, a GPU with what it is called."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
