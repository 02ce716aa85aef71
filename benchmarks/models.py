"""The networks and labelled images of the data folder."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dreamquant
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.network.graph import Network
from dreamquant.samples import Samples

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = ("cifar10/cifar10_test.npz", "label"), ("cifar10/cifar10_train20k.npz", "label")
NIPS = ("imagenet/nips2017", "label"), ("imagenet/val10x50", "label")
DIGITS = Path(__file__).parent.parent / "examples" / "digits"
VAL = ("imagenet/val10x50", "label10"), ("imagenet/nips2017", "label")


@dataclass(frozen=True)
class Model:
    """A file, and the images (file, column of the labels) that test it and that stand for its real data, in the data folder.

    The digits network lies in the project and needs no data folder; it stores its own normalisation, and has no images but those
    that test it.
    """

    file: str
    test: tuple[str, str]
    real: tuple[str, str] | None


MODELS = {
    "digits": Model(str(DIGITS / "digits.pt2"), (str(DIGITS / "digits_test.npz"), "label"), None),
    "resnet20": Model("cifar10/resnet20.pt2", *CIFAR),
    "resnet20_bnfolded": Model("cifar10/resnet20_bnfolded.onnx", *CIFAR),
    "resnet56": Model("cifar10/resnet56.pt2", *CIFAR),
    "mobilenetv1": Model("imagenet/mobilenetv1_025.pt2", *NIPS),
    "mobilenetv1_bnfolded": Model("imagenet/mobilenetv1_025_bnfolded.onnx", *NIPS),
    "squeezenet": Model("imagenet/squeezenet1_1.onnx", *NIPS),
    "mobilenetv2": Model("imagenet/mobilenetv2_imagenette.pt2", *VAL),
    "mobilenetv2_bnfolded": Model("imagenet/mobilenetv2_imagenette.onnx", *VAL),
}


@cache
def network(data: Path, name: str) -> Network:
    """A network, with the normalisation that all of the data folder's classifiers have."""
    return dreamquant.load(data / MODELS[name].file, **normalisation(name))


def normalisation(name: str) -> dict[str, Any]:
    """What has to be said of a file's pixels."""
    return {} if name == "digits" else {"mean": MEAN, "std": STD}


@cache
def test_images(data: Path, name: str) -> LabelledImages:
    """The labelled images that a network is tested on."""
    return labelled(data, *MODELS[name].test)


@cache
def _photographs(data: Path, name: str) -> torch.Tensor:
    where = MODELS[name].real
    if where is None:
        raise SystemExit(f"there are no real images for {name}")
    real = labelled(data, *where).spread(1000)
    batches = real.batches(100, input_shape=network(data, name).input_shape, mean=MEAN, std=STD)
    return torch.from_numpy(np.concatenate([images for images, _ in batches]))


def real_samples(data: Path, name: str, count: int, seed: int) -> Samples:
    """Real images, none of which tests the network, drawn by `seed`."""
    found = _photographs(data, name)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return Samples(found[order[:count]], method="real", seed=seed)


def script(path: Path) -> dict[str, Any]:
    """What a script that is no part of the project defines; it finds what lies beside it."""
    sys.path.insert(0, str(path.parent))
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.remove(str(path.parent))


def labelled(data: Path, file: str, column: str) -> LabelledImages:
    if file.endswith(".npz"):
        return load_labelled(data / file)
    return load_labelled(data / f"{file}.zip", labels=data / f"{file}_labels.csv", label_column=column)
