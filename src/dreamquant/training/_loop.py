"""The loop that all training methods share: a fake-quantized student learns what its float teacher answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import ModelError, OptionError
from dreamquant.network.answers import class_logits, spreads, top1_agreement
from dreamquant.network.answers import loss as answer_loss
from dreamquant.network.fingerprint import fingerprint
from dreamquant.network.graph import Network, digest
from dreamquant.network.opaque import check_gradient
from dreamquant.network.outputs import class_output
from dreamquant.network.scores import float_answers
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.synthesis._loop import class_count
from dreamquant.training._sources import Batch, Source
from dreamquant.training._store import Checkpoint, optimizer_state, restore_optimizer
from dreamquant.training._trainee import Trainee

Callback = Callable[[int, int, float], None]  # (steps done, steps in all, loss)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the student's logits of classes, the teacher's, the labels
DECAY = 0.1  # of the learning rates at each milestone
HELD_OUT = 0.125  # of a fixed set, where the stopping rule needs images

# budgets, ours, for a processor: few and larger steps, clipped, of a generator that learns fast
STANDARD: dict[str, object] = {
    "epochs": 16,
    "iterations": 25,
    "batch": 32,
    "learning_rate": 1e-4,
    "milestones": "12,15",
    "warm_up": 8,
    "range_epochs": 8,
    "generator_rate": 1e-2,
    "width": 64,
    "clip": 100.0,
}
QUICK = STANDARD | {"epochs": 8, "iterations": 15, "milestones": "7", "warm_up": 4, "range_epochs": 4, "width": 32}

log = logging.getLogger("dreamquant")


@dataclass(frozen=True)
class Schedule:
    """How long, and at what rates. SGD with Nesterov momentum; rates fall to a tenth at each of the `milestones` (epochs).

    Weights learn from epoch `warm_up` on. Activations' ranges follow what passes in the first `range_epochs` and are held then;
    with 0 they stay the student's. `clip` is the largest norm of the gradient (0: any). With `patience` above 0 training ends
    after so many epochs without a new best agreement with the teacher, on images that nothing is trained on.
    """

    epochs: int
    iterations: int
    warm_up: int
    range_epochs: int
    learning_rate: float
    momentum: float
    weight_decay: float
    milestones: str
    clip: float
    patience: int

    def __post_init__(self) -> None:
        if min(self.epochs, self.iterations) < 1:
            raise OptionError(f"epochs is {self.epochs} and iterations is {self.iterations}; both must be at least 1")
        if min(self.warm_up, self.range_epochs, self.patience) < 0 or self.clip < 0:
            raise OptionError("warm_up, range_epochs, clip and patience cannot be below 0")
        for name, value in (("learning_rate", self.learning_rate), ("momentum", self.momentum)):
            if not 0 < value < math.inf:
                raise OptionError(f"{name} is {value}; it must be above 0 and finite")
        self.factor(0)

    def factor(self, epoch: int) -> float:
        """What the first learning rates are multiplied with in an epoch."""
        try:
            passed = [int(part) <= epoch for part in self.milestones.split(",") if part.strip()]
        except ValueError:
            raise OptionError(f"milestones is {self.milestones!r}; write the epochs as 100,200,300") from None
        return DECAY ** sum(passed)


@dataclass(frozen=True)
class Phase:
    """The source of all epochs before `until` that no earlier phase has."""

    until: int
    source: Source


def train_student(
    network: Network,
    student: Student,
    held_out: Tensor,
    phases: Sequence[Phase],
    loss: Loss,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    callback: Callback | None,
    folder: Path | None,
) -> Student:
    """A student of its own, as it is after the last epoch; never the best of them.

    What `loss` says of the classes is learnt, and of other outputs their distance from the teacher's. Each epoch's state
    is kept in `folder`, the state of `generator`, from which all randomness comes, with it: a run that goes on ends with the same
    bits. A loss, or a weight, that is not finite ends training with the state after the last good epoch, and a warning.
    `held_out` (N, C, H, W) are images for the stopping rule.
    """
    class_count(network)
    trainee = Trainee(student)
    made_by = [schedule, loss, *((phase.until, phase.source.made_by) for phase in phases), student.plan, student.bits]
    made_by += [generator.initial_seed(), digest([held_out]), digest(trainee.parameters()), fingerprint(network)]
    run = _Run(network, trainee, held_out, phases, loss, schedule, generator)
    store = Checkpoint(folder, repr(made_by))
    kept = store.restore()
    if kept is not None:
        run.restore(kept)
    total = schedule.epochs * schedule.iterations
    while run.epoch < schedule.epochs and not run.settled:
        before = trainee.state()
        trouble = _epoch(run, callback, total)
        if trouble:
            trainee.restore(before)
            log.warning(
                "training: %s in epoch %d; the student is as it was before that epoch, and training ends (%s)",
                trouble,
                run.epoch + 1,
                "a smaller learning_rate, or clip above 0, may help",
            )
            break
        run.epoch += 1
        run.compare()
        if folder is not None:
            store.keep(run.state())
    return trainee.student()


def split(samples: Samples, schedule: Schedule, generator: torch.Generator) -> tuple[Samples, Tensor]:
    """(samples to train on, images for the stopping rule); without that rule all of them are trained on."""
    if not schedule.patience:
        return samples, samples.images
    if len(samples) < 2:
        raise OptionError("patience needs at least two images: one to train on, one to compare on")
    order = torch.randperm(len(samples), generator=generator)
    count = max(1, round(HELD_OUT * len(samples)))
    held_out, kept = order[:count], order[count:]
    labels = None if samples.labels is None else samples.labels[kept]
    return Samples(samples.images[kept], labels), samples.images[held_out]


class _Run:
    """Everything that changes in the course of a training."""

    def __init__(
        self,
        network: Network,
        trainee: Trainee,
        held_out: Tensor,
        phases: Sequence[Phase],
        loss: Loss,
        schedule: Schedule,
        generator: torch.Generator,
    ) -> None:
        self.network, self.trainee, self.held_out = network, trainee, held_out
        self.phases, self.loss, self.schedule, self.generator = phases, loss, schedule, generator
        self.optimizer = torch.optim.SGD(
            trainee.parameters(),
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            nesterov=True,
        )
        self.place = class_output(network.outputs) or 0
        self.taught = float_answers(network, held_out)
        self.variances = spreads(network.outputs, self.taught)
        self.epoch, self.best, self.waited = 0, -1.0, 0  # waited: epochs since the best agreement

    @property
    def settled(self) -> bool:
        return 0 < self.schedule.patience <= self.waited

    def source(self, epoch: int) -> Source:
        return next(phase.source for phase in self.phases if epoch < phase.until)

    def compare(self) -> None:
        """Note how far the last epoch, where weights learnt in it, brought the student's answers to the teacher's."""
        if not self.schedule.patience or self.epoch <= self.schedule.warm_up:
            return
        self.trainee.observe(False)
        agreement = top1_agreement(self.logits(self.taught), self.logits(self.trainee.answers(self.held_out)))
        self.waited = 0 if agreement > self.best else self.waited + 1
        self.best = max(self.best, agreement)

    def logits(self, answers: list[Tensor]) -> Tensor:
        """Of the classes that training is for."""
        return class_logits(self.network.outputs[self.place], answers[self.place])

    def others(self, expected: list[Tensor], actual: list[Tensor]) -> Tensor:
        """The distances of the other outputs from the teacher's, summed."""
        found = torch.zeros((), device=CPU)
        for place, values in enumerate(zip(self.network.outputs, expected, actual, self.variances, strict=False)):
            if place != self.place and values[0].axis is not None and values[0].form != "numbers":
                output, taught, told, variance = values
                found = found + answer_loss(output, taught.to(told.device), told, variance)
        return found

    def state(self) -> dict[str, Tensor]:
        """All of it; of the sources, only what is needed from here on."""
        parts = {"student": self.trainee.state(), "optimizer": optimizer_state(self.optimizer)}
        if self.epoch < self.schedule.epochs:
            parts["source"] = self.source(self.epoch).state() if self._goes_on() else {}
        best = torch.tensor(self.best, dtype=torch.float64, device=CPU)
        counts = {"epoch": torch.tensor([self.epoch, self.waited], device=CPU), "best": best}
        named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return {**named, **counts, "random": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "optimizer": {}, "source": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.epoch, self.waited = state["epoch"].tolist()
        self.best = state["best"].item()
        self.trainee.restore(parts["student"])
        restore_optimizer(self.optimizer, parts["optimizer"])
        if parts["source"]:
            self.source(self.epoch).restore(parts["source"])
        self.generator.set_state(state["random"])

    def _goes_on(self) -> bool:
        """Whether the source of the next epoch was that of the last."""
        return self.source(self.epoch) is self.source(self.epoch - 1)


def _epoch(run: _Run, callback: Callback | None, total: int) -> str:
    """One epoch; what went wrong in it, if anything."""
    schedule, trainee, source = run.schedule, run.trainee, run.source(run.epoch)
    factor = schedule.factor(run.epoch)
    source.decay(factor)
    for group in run.optimizer.param_groups:
        group["lr"] = factor * schedule.learning_rate
    trainee.observe(run.epoch < schedule.range_epochs)
    for iteration in range(schedule.iterations):
        batch = source()
        try:
            value = _step(run, batch)
        except ModelError as error:  # weights so large that no grid holds them
            return str(error)
        for name, number in (("the loss", value), ("the generator's loss", batch.loss)):
            if not math.isfinite(number):
                return f"{name} became {number}"
        if callback is not None:
            callback(run.epoch * schedule.iterations + iteration + 1, total, value)
    finite = all(bool(parameter.isfinite().all()) for parameter in trainee.parameters())
    return "" if finite else "a weight was no longer finite"


def _step(run: _Run, batch: Batch) -> float:
    """The student's loss on a batch, after which it learns; while only the generator has something to learn, that one's."""
    schedule, trainee = run.schedule, run.trainee
    learns = run.epoch >= schedule.warm_up
    if not learns and run.epoch >= schedule.range_epochs:
        return batch.loss
    with torch.set_grad_enabled(learns):
        answers = trainee(batch.images)
        loss = run.loss(run.logits(answers), batch.teacher, batch.labels)
        if batch.answers:
            loss = loss + run.others(batch.answers, answers)
    if learns:
        run.optimizer.zero_grad(set_to_none=True)
        check_gradient(loss, "the error of the answers", "leave training out")
        loss.backward()  # type: ignore[no-untyped-call]
        if schedule.clip:
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), schedule.clip)
        run.optimizer.step()
    return loss.item()
