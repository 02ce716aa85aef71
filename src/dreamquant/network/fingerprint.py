"""A text that tells networks apart: two have the same one only if they compute the same, in the same order, on like devices."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx

from dreamquant.devices import CPU, device_name
from dreamquant.kept import digest
from dreamquant.network.graph import Network


def fingerprint(network: Network) -> str:
    """A hash of the graph (each node, what it calls and on what), of every stored tensor, and of the input space."""
    space = (network.input_shape, network.space, network.batch, network.outputs)
    found = hashlib.sha256(repr(space).encode())
    if network.device != CPU:
        found.update(device_name(network.device).encode())
    for node in network.graph.graph.nodes:
        found.update(f"{node.name} {node.op} {_target(node.target)} {_shown((node.args, node.kwargs))}\n".encode())
    found.update(digest(dict(network.graph.named_buffers())).encode())
    return found.hexdigest()


def _target(target: Any) -> str:
    if isinstance(target, str | torch._ops.OpOverload):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def _shown(arguments: Any) -> str:
    return repr(fx.node.map_aggregate(arguments, lambda one: f"%{one.name}" if isinstance(one, fx.Node) else one))
