"""Dreams as pictures that are part of the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image
from torch import Tensor

from dreamquant.network.graph import Network
from dreamquant.network.scores import class_probabilities, float_answers
from dreamquant.samples import Samples
from dreamquant.storage import visible_pixels

SHOWN = 32  # images
LARGEST = 80  # pixels of a side; larger images are shown smaller
VISIBLE = (1, 3)  # channels


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, what it shows, and what the network takes it for."""

    uri: str
    alt: str
    label: str


def pictures(samples: Samples, network: Network) -> list[Picture]:
    """The first images; none where they have a number of channels that no picture has."""
    if network.input_shape[0] not in VISIBLE:
        return []
    first = replace(samples, images=samples.images[:SHOWN])
    labels = _labels(first, network)
    return [
        Picture(_png(pixels), f"dream {index}{label and f', taken for {label}'}", label)
        for index, (pixels, label) in enumerate(zip(visible_pixels(first, network), labels, strict=True), start=1)
    ]


def about_pictures(samples: Samples, network: Network) -> str:
    """What is shown and how, or why nothing is."""
    channels = network.input_shape[0]
    if channels not in VISIBLE:
        return f"There is no picture: images of {channels} channels are neither grey nor coloured."
    shown = min(SHOWN, len(samples))
    which = f"All {shown} of them" if shown == len(samples) else f"The first {shown} of {len(samples)}"
    if network.mean:
        return f"{which}, as pixels: the network's normalisation is undone."
    return (
        f"{which}, each scaled to its own range: how pixels are normalised is not known, so that brightness and contrast"
        " mean nothing."
    )


def _labels(samples: Samples, network: Network) -> list[str]:
    probabilities = class_probabilities(network, float_answers(network, samples.images))
    if probabilities is None:
        return [""] * len(samples)
    confidence, classes = probabilities.max(1)
    return [f"class {one}, {sure:.2f}" for one, sure in zip(classes.tolist(), confidence.tolist(), strict=True)]


def _png(pixels: Tensor) -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    data = BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
