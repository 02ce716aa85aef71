"""The loop that all reconstruction methods share: unit after unit, learn what makes the unit's output the float one's."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from dreamquant.errors import OptionError, unknown
from dreamquant.network.edit import set_tensor
from dreamquant.network.fingerprint import fingerprint
from dreamquant.network.graph import digest, tensor_of, whole_batches
from dreamquant.network.notes import is_tensor, notes, shape_of
from dreamquant.network.opaque import check_gradient
from dreamquant.quantization.biases import restore_biases, settle_biases
from dreamquant.quantization.grid import FakeQuantize, Grid
from dreamquant.quantization.plan import LARGEST_BITS
from dreamquant.quantization.student import Student, quantizer_nodes
from dreamquant.quantization.walk import Chunks, keep_float, quantizer_named, quantizer_of, walk, with_grids
from dreamquant.reconstruction._learned import LearnedStep, SoftRounding, mixed
from dreamquant.reconstruction._store import Progress, Spill
from dreamquant.reconstruction._units import Unit, grouped, layer_units, segment_units
from dreamquant.samples import in_order

Callback = Callable[[int, int, float], None]  # (steps done, steps in all, loss)
LARGEST_BETA, SMALLEST_BETA = 20.0, 2.0
FLOAT_BYTES, KEPT_VALUES = 4, 3  # of a tensor in training: itself, its gradient, what its quantizer keeps

log = logging.getLogger("dreamquant")


@dataclass(frozen=True)
class Schedule:
    """What a method learns, and how. Rates are Adam's.

    `weights`: "rounding", "rounding and scale", or "fixed". `activations`: "off" (float), "fixed" (on the grids found), or
    "learned" steps. `drop` is the probability that an element of the unit's input, and of each quantized activation in it, is the
    float one's. The error is |difference|^power, summed over channels, averaged over the rest; `weight` times the regulariser is
    added after `warm_up` of the steps, its exponent falling from 20 to 2.
    """

    steps: int
    unit: Literal["layer", "segment", "group"]
    weights: Literal["rounding", "rounding and scale", "fixed"]
    activations: Literal["off", "fixed", "learned"]
    batch: int = 32
    rounding_rate: float = 1e-3
    scale_rate: float = 1e-4
    activation_rate: float = 4e-5
    weight: float = 0.01
    warm_up: float = 0.2
    drop: float = 0.0
    power: float = 2.0
    memory: float = 4.0  # gigabytes for the inputs and outputs of a unit on all images; files are mapped beyond it


UNITS: dict[str, Callable[[Student], list[Unit]]] = {
    "layer": layer_units,
    "segment": segment_units,
    "group": lambda student: grouped(segment_units(student)),
}


def unit_name(text: str) -> Literal["layer", "segment", "group"]:
    """A kind of unit; `OptionError` names the known ones."""
    if text not in UNITS:
        raise OptionError(unknown("unit", text, UNITS))
    return text  # type: ignore[return-value]


def reconstruct_units(
    student: Student, images: Tensor, schedules: list[Schedule], *, seed: int, callback: Callback | None, folder: Path | None
) -> Student:
    """A student of its own whose units were learnt one after the other on images (N, C, H, W), once over with each schedule.

    Units whose tensors all have 8 bits stay as they are. The seed of a unit's draws depends on its place alone, so that a run
    that goes on with the next unit ends with the same bits.
    """
    student = replace(student, network=student.network.with_graph(copy.deepcopy(student.network.graph)))
    restore_biases(student)  # what they were corrected for changes now
    passes = [{unit.nodes[0]: unit for unit in _units(student, schedule) if _learnable(unit, schedule)} for schedule in schedules]
    total = sum(len(work) * schedule.steps for work, schedule in zip(passes, schedules, strict=True))
    images = whole_batches(images, student.network.batch)
    made_by = {
        "seed": seed,
        "from": fingerprint(student.network),
        "images": digest([images]),
        "grids": digest(_grids(student)),
        "plan": student.plan.model_dump(),
        "bits": str(student.bits),
    }
    done = 0
    for number, (work, schedule) in enumerate(zip(passes, schedules, strict=True)):
        progress = Progress(folder and folder / f"pass-{number}", made_by | {"schedules": [asdict(one) for one in schedules]})
        told = None if callback is None else _further(callback, done, total)
        _pass(student, images, work, schedule, seed=seed + number, callback=told, progress=progress)
        done += len(work) * schedule.steps
    settle_biases(student, images)
    return student


def _grids(student: Student) -> list[Tensor]:
    """All that quantizers round to."""
    grids = [module.grid for module in student.network.graph.modules() if isinstance(module, FakeQuantize)]
    return [part for grid in grids if isinstance(grid, Grid) for part in (grid.scale, grid.zero_point)]


def _further(callback: Callback, before: int, total: int) -> Callback:
    return lambda done, _, loss: callback(before + done, total, loss)


def _pass(
    student: Student,
    images: Tensor,
    work: dict[fx.Node, Unit],
    schedule: Schedule,
    *,
    seed: int,
    callback: Callback | None,
    progress: Progress,
) -> None:
    spill = Spill(schedule.memory / 4 * 1e9)
    frozen: set[str] = set()
    places = {node: place for place, node in enumerate(work)}

    def during(unit: Unit, quantized: Chunks, exact: Chunks) -> tuple[Chunks, Chunks]:
        targets = spill([unit.run(value, exact=True) for value in exact])
        place = places[unit.nodes[0]]
        if not progress.restore(place, unit):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
            with torch.enable_grad():
                losses = _learn(unit, quantized, exact, targets, schedule, frozen, generator)
                for step, loss in enumerate(losses, place * schedule.steps + 1):
                    if callback is not None:
                        callback(step, 0, loss)
            progress.keep(place, unit)
        frozen.update(str(node.target) for node in unit.quantizers)
        return spill([unit.run(value) for value in quantized]), targets

    graph = student.network.graph
    activations = [node for node in quantizer_nodes(graph.graph) if notes(node).kind == "activation"]
    off = activations if schedule.activations == "off" else []
    with with_grids(dict.fromkeys(quantizer_of(graph, node) for node in off)):
        walk(student.network, images, pieces=work, during=during)


def _units(student: Student, schedule: Schedule) -> list[Unit]:
    """The units of a schedule; those that would take more memory to learn than there may be are taken apart into layers."""
    found: list[Unit] = []
    for unit in UNITS[schedule.unit](student):
        need = FLOAT_BYTES * KEPT_VALUES * schedule.batch * sum(_size(node) for node in unit.nodes)
        if need <= schedule.memory * 1e9 or len(unit.layers) <= 1:
            found.append(unit)
            continue
        parts = [part for part in layer_units(student) if part.nodes[0] in unit.nodes]
        log.warning(
            "%s to %s: a batch takes %.1f GB to learn on and memory is %g: its %d layers are learnt one by one",
            unit.input.name,
            unit.output.name,
            need / 1e9,
            schedule.memory,
            len(parts),
        )
        found.extend(parts)
    return found


def _size(node: fx.Node) -> int:
    return math.prod(shape_of(node)[1:]) if is_tensor(node) else 0


def _learnable(unit: Unit, schedule: Schedule) -> bool:
    """Whether the schedule has anything to learn in a unit that has tensors of few bits."""
    grids = [quantizer_of(unit.graph, node).grid for node in (*unit.quantizers, *_weight_quantizers(unit))]
    if all(grid is None or grid.bits >= LARGEST_BITS for grid in grids):
        return False
    weights = schedule.weights != "fixed" and bool(_weight_quantizers(unit))
    return weights or (schedule.activations == "learned" and bool(_steps(unit, set())))


def _weight_quantizers(unit: Unit) -> list[fx.Node]:
    """The quantizers of the unit's weights that no other layer reads."""
    return [
        node
        for node in unit.weights
        if isinstance(quantizer_of(unit.graph, node).grid, Grid) and len(node.users) == len(node.all_input_nodes[0].users) == 1
    ]


def _steps(unit: Unit, frozen: set[str]) -> list[fx.Node]:
    """The unit's activation quantizers whose grid no earlier unit has used."""
    return [
        node
        for node in unit.quantizers
        if isinstance(quantizer_of(unit.graph, node).grid, Grid) and str(node.target) not in frozen
    ]


def _learn(
    unit: Unit,
    quantized: Chunks,
    exact: Chunks,
    targets: Chunks,
    schedule: Schedule,
    frozen: set[str],
    generator: torch.Generator,
) -> Iterator[float]:
    """Learn one unit and write what was learnt into the student's graph; yields the error of each step."""
    rounding = {
        node: SoftRounding(
            tensor_of(unit.graph, node.all_input_nodes[0]),
            _grid(unit.graph, node),
            learn_scale=schedule.weights == "rounding and scale",
        )
        for node in (_weight_quantizers(unit) if schedule.weights != "fixed" else [])
    }
    steps: dict[str, LearnedStep] = {}  # a grid may stand at several places
    if schedule.activations != "off":
        for node in unit.quantizers:
            name, grid = str(node.target), quantizer_of(unit.graph, node).grid
            if isinstance(grid, Grid) and name not in steps:
                learn = schedule.activations == "learned" and name not in frozen and grid.bits < LARGEST_BITS
                steps[name] = LearnedStep(grid, learn=learn, drop=schedule.drop, generator=generator)
    modules = {**rounding, **{node: steps[str(node.target)] for node in unit.quantizers if str(node.target) in steps}}
    scales = [module.scale for module in rounding.values() if module.scale.requires_grad]
    learnt = [step.scale for step in steps.values() if step.scale.requires_grad]
    logits = [module.logits for module in rounding.values()]
    optimizers, schedulers = [], []
    for parameters, rate, falls in (
        (logits, schedule.rounding_rate, False),
        (scales, schedule.scale_rate, True),
        (learnt, schedule.activation_rate, True),
    ):
        if parameters:
            optimizers.append(torch.optim.Adam(parameters, lr=rate))
            if falls:
                schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], T_max=schedule.steps))
    if not optimizers:  # its activations stand on grids that units before it have used
        return
    count = sum(len(chunk) for chunk in targets)
    warm = schedule.warm_up * schedule.steps
    for step in range(schedule.steps):
        chosen = torch.randperm(count, generator=generator)[: schedule.batch].tolist()
        x = _take(quantized, chosen)
        if schedule.drop:
            x = mixed(x, _take(exact, chosen), schedule.drop, generator)
        output = unit.run(x, modules)
        difference = output - _take(targets, chosen).to(output.device)
        channels = 1 if difference.dim() > 1 else 0
        error = difference.abs().pow(schedule.power).sum(channels).mean()
        loss = error
        if rounding and step >= warm:
            share = (step - warm) / max(schedule.steps - warm, 1)
            beta = SMALLEST_BETA + (LARGEST_BETA - SMALLEST_BETA) * max(0.0, 1 - share)
            penalties = torch.stack([module.regulariser(beta) for module in rounding.values()])
            loss = error + schedule.weight * penalties.sum()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        check_gradient(loss, f"the error of {unit.layers[0].name}", "round to the nearest: --set reconstruction.method=nearest")
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        yield error.item()
    for node, module in rounding.items():
        weight, grid = module.rounded()
        stored = node.all_input_nodes[0]
        keep_float(unit.graph, stored)
        set_tensor(unit.graph, stored, in_order(weight))
        quantizer_of(unit.graph, node).grid = grid
    for name, learnt_step in steps.items():
        quantizer_named(unit.graph, name).grid = learnt_step.learnt()


def _take(chunks: Chunks, rows: list[int]) -> Tensor:
    """Rows of a tensor that lies in pieces of one size, but for the last."""
    size = len(chunks[0])
    return torch.stack([chunks[row // size][row % size] for row in rows])


def _grid(graph: fx.GraphModule, node: fx.Node) -> Grid:
    grid = quantizer_of(graph, node).grid
    assert isinstance(grid, Grid)
    return grid
