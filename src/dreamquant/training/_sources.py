"""Where training's images come from: a generator that learns beside the student, or a fixed set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dreamquant.errors import OptionError
from dreamquant.network.answers import class_logits
from dreamquant.network.graph import Network, digest
from dreamquant.network.outputs import class_output
from dreamquant.network.scores import float_answers
from dreamquant.samples import Samples
from dreamquant.synthesis._conditional import BETAS, ConditionalGenerator
from dreamquant.synthesis._hard import crop_and_flip
from dreamquant.synthesis._loop import class_count
from dreamquant.training._store import optimizer_state, restore_optimizer

log = logging.getLogger("dreamquant")

Distance = Callable[[list[Tensor]], Tensor]  # of what enters the BatchNorms


class Batch(NamedTuple):
    """What one step trains on: images (N, C, H, W), labels (N,), the teacher's logits of classes, the source's own loss (0: it
    has none) and, of a network of several outputs, all of the teacher's answers."""

    images: Tensor
    labels: Tensor
    teacher: Tensor
    loss: float
    answers: list[Tensor]


class Source(Protocol):
    """Gives batches; what it keeps from one to the next can be stored."""

    made_by: str

    def __call__(self) -> Batch: ...

    def decay(self, factor: float) -> None:
        """Learn at `factor` times the first rate."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Maker:
    """A `ConditionalGenerator` and how it learns: Adam at `rate` on cross entropy + weight * distance of the statistics."""

    batch: int
    rate: float
    weight: float
    latent: int
    width: int
    conditioning: str
    attention: bool = False


class Dreams:
    """Batches of a generator, which makes one step of its own with each. `distance` stands in for GDFQ's, as `distance_name`."""

    def __init__(
        self,
        network: Network,
        generator: torch.Generator,
        maker: Maker,
        distance: Distance | None = None,
        distance_name: str = "",
    ) -> None:
        if not 0 < maker.rate < math.inf:
            raise OptionError(f"generator_rate is {maker.rate}; it must be above 0 and finite")
        self.made_by = f"{maker} {distance_name}"
        self.network = network
        self.maker, self.distance = maker, distance
        self.drawer = ConditionalGenerator(
            network,
            generator,
            attention=maker.attention,
            conditioning=maker.conditioning,
            batch=maker.batch,
            latent=maker.latent,
            width=maker.width,
        )
        if not self.drawer.targets:
            log.warning("training: there are no BatchNorm statistics; the generator learns from the classes alone")
        self.optimizer = torch.optim.Adam(self.drawer.module.parameters(), lr=maker.rate, betas=BETAS)

    def __call__(self) -> Batch:
        shown = self.drawer.show()
        loss = self.drawer.loss(shown, self.maker.weight, self.distance)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        images = shown.images.detach()
        answers = float_answers(self.network, images) if len(self.network.outputs) > 1 else []
        return Batch(images, shown.labels, shown.seen.scores.detach().float(), loss.item(), answers)

    def decay(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.maker.rate

    def state(self) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in self.drawer.module.state_dict().items()} | {
            f"optimizer.{name}": value for name, value in optimizer_state(self.optimizer).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.drawer.module.load_state_dict(
            {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}
        )
        restore_optimizer(
            self.optimizer,
            {name.removeprefix("optimizer."): value for name, value in state.items() if name.startswith("optimizer.")},
        )


class FixedSet:
    """Random batches of given images, each a random part of its image and half of them mirrored (`crop` 0: as they are).

    Images without labels get the teacher's first choice.
    """

    def __init__(self, network: Network, samples: Samples, generator: torch.Generator, *, batch: int, crop: float) -> None:
        if not 0 <= crop <= 1:
            raise OptionError(f"crop is {crop}; it is a share of the image, from 0 (no cropping) to 1")
        if batch < 1:
            raise OptionError(f"batch is {batch}; at least one image is needed")
        self.network, self.images, self.generator, self.batch, self.crop = network, samples.images, generator, batch, crop
        self.labels = self._teacher(self.images)[0].argmax(1) if samples.labels is None else samples.labels
        self.made_by = f"batch {batch}, crop {crop}, images {digest([self.images, self.labels])}"

    def __call__(self) -> Batch:
        chosen = torch.randperm(len(self.images), generator=self.generator)[: self.batch]
        images = self.images[chosen].to(self.network.device)
        if self.crop:
            images = crop_and_flip(images, self.crop, self.generator)
        teacher, answers = self._teacher(images)
        return Batch(images, self.labels[chosen].to(images.device), teacher.to(images.device), 0.0, answers)

    def _teacher(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The float network's logits of classes, and all its answers."""
        class_count(self.network)
        place, answers = class_output(self.network.outputs) or 0, float_answers(self.network, images)
        return class_logits(self.network.outputs[place], answers[place]), answers

    def decay(self, factor: float) -> None:
        """There is nothing here that learns."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """There is nothing to take up."""
