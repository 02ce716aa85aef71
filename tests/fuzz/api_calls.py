"""Hostile calls of the Python API: what a program around it may have set, and values of neighbouring types."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tests.fuzz.cases import DIGITS, HUGE, Case, hostile
from torch import nn

import dreamquant
from dreamquant import Samples

ONNX, PT2, DATA = (DIGITS / name for name in ("digits_bnfolded.onnx", "digits.pt2", "digits_test.npz"))
SHAPE = (1, 16, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def whole(model: Any = ONNX, path: Any = Path("out.onnx"), samples: Samples | None = None) -> None:
    """Load, synthesize, quantize, export."""
    shape = SHAPE if isinstance(model, nn.Module) else None
    network = dreamquant.load(model, input_shape=shape)
    made = samples if samples is not None else dreamquant.synthesize(network, 4, method="noise")
    dreamquant.export(dreamquant.quantize(network, made), path, made)


def call(function: Callable[[Random, Path], Callable[[], object]]) -> Callable[[Random, Path], Case]:
    """Enter a function that chooses, and returns what is then called."""

    def made(random: Random, folder: Path) -> Case:
        return Case(function.__name__, function(random, folder))

    return hostile("api")(made)


@call
def double_by_default(random: Random, folder: Path) -> Callable[[], object]:
    model = random.choice((ONNX, PT2, Net()))

    def work() -> None:
        torch.set_default_dtype(random.choice((torch.float64, torch.float16, torch.bfloat16)))
        whole(model)

    return work


@call
def inference_mode(random: Random, folder: Path) -> Callable[[], object]:
    mode = random.choice((torch.inference_mode, torch.no_grad))
    model, method = random.choice((ONNX, PT2, Net())), random.choice(("noise", "fractal", "rsd"))

    def work() -> None:
        with mode():
            network = dreamquant.load(model, input_shape=SHAPE)
            made = dreamquant.synthesize(network, 2, method=method, **({"steps": 2} if method == "rsd" else {}))
            dreamquant.export(dreamquant.quantize(network, made), Path("out.onnx"), made)

    return work


@call
def samples_of_nothing(random: Random, folder: Path) -> Callable[[], object]:
    images = torch.zeros(4, *SHAPE)
    kind = random.choice(
        ("nan", "inf", "empty", "shape", "rank", "dtype", "int", "numpy", "huge", "grad", "strided", "scalar", "constant")
    )
    made: Any = {
        "nan": lambda: images.fill_(float("nan")),
        "inf": lambda: images.fill_(float("inf")),
        "empty": lambda: images[:0],
        "shape": lambda: torch.zeros(4, 3, 8, 8),
        "rank": lambda: torch.zeros(4, 16, 16),
        "dtype": lambda: images.double(),
        "int": lambda: images.to(torch.uint8),
        "numpy": lambda: images.numpy(),
        "huge": lambda: images.fill_(3e38),
        "grad": lambda: images.requires_grad_(),
        "strided": lambda: torch.zeros(4, 16, 16, 1).permute(0, 3, 1, 2),
        "scalar": lambda: torch.tensor(1.0),
        "constant": lambda: images,
    }[kind]()
    return lambda: whole(samples=Samples(made))


@call
def texts_for_paths(random: Random, folder: Path) -> Callable[[], object]:
    def work() -> None:
        network = dreamquant.load(str(ONNX))
        made = dreamquant.synthesize(network, 4, method="noise")
        dreamquant.export(dreamquant.quantize(network, made), "out.onnx", made)
        dreamquant.write_samples(made, network, "made.npz")
        dreamquant.read_samples("made.npz")
        dreamquant.load_labelled(str(DATA))
        dreamquant.compare(str(ONNX), "out.onnx", samples=made, rounds=1)

    return work


@call
def numbers_of_numpy(random: Random, folder: Path) -> Callable[[], object]:
    kind = random.choice((np.int64, np.int32, np.uint8, np.float32))

    def work() -> None:
        network = dreamquant.load(Net(), input_shape=tuple(kind(size) for size in SHAPE))
        made = dreamquant.synthesize(network, kind(4), method=random.choice(("noise", "fractal")), seed=kind(3))
        dreamquant.export(dreamquant.quantize(network, made), Path("out.onnx"), made)

    return work


@call
def two_threads(random: Random, folder: Path) -> Callable[[], object]:
    models = [random.choice((ONNX, PT2, Net())) for _ in range(2)]

    def work() -> None:
        errors: list[BaseException] = []

        def one(number: int) -> None:
            try:
                whole(models[number], Path(f"out{number}.onnx"))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    return work


@call
def impossible_arguments(random: Random, folder: Path) -> Callable[[], object]:
    number = random.choice((*HUGE, -1, 0))
    works: tuple[Callable[[], object], ...] = (
        lambda: dreamquant.load(ONNX, input_shape=(1, number, 16)),
        lambda: dreamquant.load(Net(), input_shape=(1, 16, number)),
        lambda: dreamquant.load(Net(), input_shape=(1, number, number)),
        lambda: dreamquant.load(Net()),
        lambda: dreamquant.load(ONNX, mean=(float("nan"),), std=(1.0,)),
        lambda: dreamquant.load("\x00"),
        lambda: dreamquant.load(""),
        lambda: dreamquant.load(Path("none.onnx")),
        lambda: dreamquant.synthesize(dreamquant.load(ONNX), number, method="noise"),
        lambda: dreamquant.synthesize(dreamquant.load(ONNX), 2, method="noise", seed=number),
        lambda: dreamquant.run(ONNX, "out.onnx", seed=number, settings=["synthesis.method=noise"], estimate=False),
        lambda: dreamquant.run(
            ONNX, "out.onnx", settings=[f"synthesis.count={number}", "synthesis.method=noise"], estimate=False
        ),
        lambda: dreamquant.compare(ONNX, ONNX, count=number, rounds=1),
    )
    return random.choice(works)


@call
def odd_modules(random: Random, folder: Path) -> Callable[[], object]:
    kind = random.choice(("none", "int", "dict", "list", "input", "nan", "raises", "double", "no weights", "complex", "deep"))

    class Odd(Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            if kind == "raises":
                raise RuntimeError("no\nforward")
            found: Any = {
                "none": None,
                "int": 3,
                "dict": {"a": y},
                "list": [y, None],
                "input": x,
                "nan": y / 0 * 0,
                "double": y.double(),
            }
            return found.get(kind, y)

    made: nn.Module = Odd()
    if kind == "no weights":
        made = nn.Identity()
    if kind == "complex":
        made = nn.Sequential(nn.Flatten(), nn.Linear(256, 3, dtype=torch.float64))
    if kind == "deep":
        made = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(100)], nn.Flatten())
    return lambda: whole(made)
