"""`InputSpace`: what numbers a network is fed, and how that is known.

Everything that dreams, calibrates or probes starts from it, and a wrong one ruins a file in silence. What is known comes from,
in this order: what the user states, what the model file says of itself, what the first nodes of the graph do to the image, and
what the first BatchNorm remembers of its training (`input_evidence`). Where none of them tells, that is an error which says what
to state; nothing is guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreamquant.devices import CPU
from dreamquant.errors import ModelError, OptionError, unknown
from dreamquant.mapped import room
from dreamquant.runtime import LAYOUT_KEY

LAYOUTS = ("NCHW", "NHWC")
CHANNELS = ("rgb", "bgr", "gray", "other")
DTYPES = ("float32", "float16", "uint8")
# pixel ranges by name: a pixel p in 0..1 is fed as (p - mean) / std
PIXELS: dict[str, tuple[float, float]] = {"0..1": (0.0, 1.0), "0..255": (0.0, 1 / 255), "-1..1": (0.5, 0.5)}
NO_PIXELS = "none"  # numbers that are no pixels: of mean 0 and deviation 1 in every channel

NATURAL_MEAN = (0.485, 0.456, 0.406)  # of photographs, pixels in 0..1 (the ImageNet training set's)
NATURAL_STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.449, 0.226  # of their brightness

KEY, MEAN_KEY, STD_KEY = "dreamquant.input", "dreamquant.mean", "dreamquant.std"  # properties of a model file


@dataclass(frozen=True)
class Statement:
    """What a user says of the input; None where nothing is said.

    `mean` and `std`, one number a channel, are subtracted from and divide pixels of the range `pixels` (0..1 where that is None);
    `layout` is one of `LAYOUTS`, `channels` of `CHANNELS`, `pixels` of `PIXELS` or "none".
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pixels: str | None = None
    layout: str | None = None
    channels: str | None = None

    def __post_init__(self) -> None:
        """Raises `OptionError` for names that are not known, and for numbers that cannot be meant."""
        if bool(self.mean) != bool(self.std):
            raise OptionError("mean and std belong together: give both or none")
        for what, given, known in (
            ("pixels", self.pixels, (*PIXELS, NO_PIXELS)),
            ("layout", self.layout, LAYOUTS),
            ("channels", self.channels, CHANNELS),
        ):
            if given is not None and given not in known:
                raise OptionError(unknown(what, given, known))
        if self.pixels == NO_PIXELS and self.mean:
            raise OptionError("pixels is none, so there are no pixels that mean and std could normalise: leave one of them out")
        for name, values in (("mean", self.mean or ()), ("std", self.std or ())):
            if not all(math.isfinite(value) for value in values):
                raise OptionError(f"{name} is {_listed(values)}; all must be finite")
        if any(value <= 0 for value in self.std or ()):
            raise OptionError(f"std is {_listed(self.std or ())}; all must be above 0")
        if self.pixels in (None, "0..1") and self.mean and self.std:
            _refuse_large(self.mean, self.std)

    @property
    def tells_numbers(self) -> bool:
        """Whether it says how pixels become the numbers that are fed."""
        return bool(self.mean) or self.pixels is not None

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std, one number a channel, of pixels in 0..1; empty for numbers that are no pixels."""
        if self.pixels == NO_PIXELS:
            return (), ()
        zero, one = PIXELS[self.pixels or "0..1"]
        if not self.mean or not self.std:
            return (zero,) * channels, (one,) * channels
        # (p - zero) / one is the pixel in its own range, and (that - mean) / std what is fed
        return tuple(zero + one * m for m in self.mean), tuple(one * s for s in self.std)


def _refuse_large(mean: Sequence[float], std: Sequence[float]) -> None:
    """Numbers of pixels in 0..255, given for pixels in 0..1, would have every image be a dot far away."""
    if max(mean) <= 1 and max(std) <= 1:
        return
    ours = [_listed([round(value / 255, 6) for value in values]) for values in (mean, std)]
    raise OptionError(
        f"mean {_listed(mean)} and std {_listed(std)} cannot be of pixels in 0..1, whose mean and deviation are 1 at most: for "
        f"pixels in 0..255 add --pixels 0..255, or give mean {ours[0]} and std {ours[1]}"
    )


@dataclass(frozen=True)
class InputSpace:
    """What a network is fed.

    A pixel p in 0..1 becomes (p - `mean`) / `std`, channel by channel; both are empty where numbers are no pixels, or it is not
    known how they come of them. `centre` and `spread`, one number a channel, are what the numbers have for mean and standard
    deviation over a set of images; empty where nothing tells. `layout` and `dtype` are the file's; inside, images are always
    float32 (N, C, H, W). `channels` is one of `CHANNELS`, empty where it is not known. `known` is how: "stated", "file", "graph",
    "measured" or "unknown", and `because` says it in words. `doubt` is what speaks against it, `bounded` whether images are to be
    kept to what pixels can be, `checked` whether a BatchNorm had its say.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    centre: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    layout: str = "NCHW"
    channels: str = ""
    dtype: str = "float32"
    known: str = "unknown"
    because: str = ""
    doubt: str = ""
    bounded: bool = True
    checked: bool = False

    @property
    def is_known(self) -> bool:
        """Whether images can be made for it."""
        return bool(self.centre)

    def statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, 1, 1) of the numbers that are fed; 0 and 1 where nothing tells."""
        centre, spread = self.centre or (0.0,) * channels, self.spread or (1.0,) * channels
        return _by_channel(centre), _by_channel(spread)

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """What a black and a white pixel are fed as, (C, 1, 1) each; None where that is not known or not to be believed."""
        if not self.mean or not self.bounded:
            return None
        mean, std = _by_channel(self.mean), _by_channel(self.std)
        return (0.0 - mean) / std, (1.0 - mean) / std

    def snapped(self, images: Tensor) -> Tensor:
        """The images as the file's own number type holds them."""
        if self.dtype not in ("uint8", "float16"):
            return images
        found = room(images.shape)
        for place, image in enumerate(images):
            found[place] = image.round().clamp(0, 255) if self.dtype == "uint8" else image.half()
        return found

    def numbers(self) -> str:
        """How pixels become what is fed, in words."""
        if not self.mean:
            moments = f"numbers of mean {_short(self.centre)} and deviation {_short(self.spread)}"
            return moments if self.centre else "unknown numbers"
        for name, (zero, one) in PIXELS.items():
            if all(math.isclose(m, zero, abs_tol=1e-9) for m in self.mean) and all(math.isclose(s, one) for s in self.std):
                return f"pixels {name}"
        return f"pixels 0..1 less mean {_short(self.mean)} by std {_short(self.std)}"

    def sentence(self) -> str:
        """What is fed and how that is known, in one line."""
        order = {"": "", "gray": "gray ", "other": "", "rgb": "RGB ", "bgr": "BGR "}[self.channels]
        form = "".join(f", {what}" for what, usual in ((self.layout, "NCHW"), (self.dtype, "float32")) if what != usual)
        why = f" ({self.known}: {self.because})" if self.because else f" ({self.known})"
        why += "" if self.checked or not self.is_known else "; no BatchNorm confirms it"
        return f"fed {order}{self.numbers()}{form}{why}" + (f"; {self.doubt}" if self.doubt else "")

    def properties(self) -> dict[str, str]:
        """What a file that is written says of its input."""
        found = {KEY: json.dumps(asdict(self)), LAYOUT_KEY: self.layout}
        if self.mean:
            found |= {MEAN_KEY: format_numbers(self.mean), STD_KEY: format_numbers(self.std)}
        return found


def _by_channel(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, device=CPU).view(-1, 1, 1)


UNKNOWN = InputSpace()


def standard(channels: int) -> InputSpace:
    """Numbers that are no pixels, of mean 0 and deviation 1."""
    return InputSpace(
        centre=(0.0,) * channels, spread=(1.0,) * channels, known="stated", because="no pixels; mean 0 and deviation 1"
    )


def of_pixels(mean: Iterable[float], std: Iterable[float], *, known: str = "stated", because: str = "") -> InputSpace:
    """The space of pixels in 0..1 that are normalised with `mean` and `std`, one number a channel."""
    means, stds = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    natural = natural_statistics(means, stds)
    return InputSpace(means, stds, *natural, known=known, because=because, channels="gray" if len(means) == 1 else "")


def natural_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What images have for mean and deviation in a space of pixels, where nothing but its normalisation is known.

    Numbers that can be a set's own mean and deviation are taken for it: such a set is fed with mean 0 and deviation 1. Round
    ones, as 0 and 1 or 0.5 and 0.5, are not, and images are taken for photographs.
    """
    if all(0.05 <= m <= 0.95 and 0.1 <= s <= 0.4 for m, s in zip(mean, std, strict=True)):
        return (0.0,) * len(mean), (1.0,) * len(mean)
    centre, deviation = (NATURAL_MEAN, NATURAL_STD) if len(mean) == 3 else ((GREY_MEAN,) * len(mean), (GREY_STD,) * len(mean))
    return (
        tuple((c - m) / s for c, m, s in zip(centre, mean, std, strict=True)),
        tuple(d / s for d, s in zip(deviation, std, strict=True)),
    )


# ---- what is stated, and what a file says


def stated(statement: Statement, channels: int, source: str) -> InputSpace | None:
    """The space that a user states; None where he does not say how pixels become numbers."""
    if not statement.tells_numbers:
        return None
    for name, values in (("mean", statement.mean or ()), ("std", statement.std or ())):
        if values and len(values) != channels:
            raise OptionError(f"{name} has {len(values)} numbers ({_listed(values)}); {source} has {channels} channels")
    mean, std = statement.normalisation(channels)
    if not mean:
        return standard(channels)
    said = [f"--pixels {statement.pixels}"] if statement.pixels else []
    said += ["--mean and --std"] if statement.mean else []
    return of_pixels(mean, std, because=" with ".join(said))


def of_properties(properties: Mapping[str, str], channels: int) -> InputSpace | None:
    """The space that a model file's properties tell: ours, those of Ultralytics, and ONNX's own of images; None for none."""
    written = _written(properties.get(KEY, ""), channels)
    if written is not None:
        return written
    mean, std = stored_normalisation(properties)
    if mean and std:
        if len(mean) != len(std):
            raise ModelError(f"the file's properties {MEAN_KEY} and {STD_KEY} have {len(mean)} and {len(std)} numbers")
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            said = f"{MEAN_KEY} {_listed(mean)} and {STD_KEY} {_listed(std)}"
            raise ModelError(f"the file's properties say {said}: no finite numbers with deviations above 0")
        return of_pixels(mean, std, known="file", because=f"its properties {MEAN_KEY} and {STD_KEY}")
    if properties.get("author") == "Ultralytics":
        found = of_pixels((0.0,) * channels, (1.0,) * channels, known="file", because="Ultralytics' networks take pixels 0..1")
        return replace(found, channels="rgb" if channels == 3 else found.channels)
    nominal = properties.get("Image.NominalPixelRange", "")
    names = {"NominalRange_0_255": "0..255", "Normalized_0_1": "0..1", "Normalized_1_1": "-1..1"}
    if nominal in names:
        zero, one = PIXELS[names[nominal]]
        order = properties.get("Image.BitmapPixelFormat", "").lower()
        found = of_pixels(
            (zero,) * channels, (one,) * channels, known="file", because=f"its property Image.NominalPixelRange, {nominal}"
        )
        return replace(found, channels=order[:3] if order[:3] in ("rgb", "bgr") and channels == 3 else found.channels)
    return None


def _written(text: str, channels: int) -> InputSpace | None:
    """What `InputSpace.properties` wrote, if that is whole."""
    try:
        fields: dict[str, Any] = json.loads(text) if text else {}
        mean, std, centre, spread = (tuple(float(v) for v in fields[name]) for name in ("mean", "std", "centre", "spread"))
        layout, channel_names, dtype, doubt = (str(fields[name]) for name in ("layout", "channels", "dtype", "doubt"))
        how = ("file", "as it was quantized for", doubt, bool(fields["bounded"]))
        found = InputSpace(mean, std, centre, spread, layout, channel_names, dtype, *how)
    except (ValueError, TypeError, KeyError):
        return None
    numbers = (*found.mean, *found.std, *found.centre, *found.spread)
    sizes = {len(values) for values in (found.mean, found.std, found.centre, found.spread)} - {0}
    whole = sizes == {channels} and found.layout in LAYOUTS and found.dtype in DTYPES and found.channels in ("", *CHANNELS)
    sound = all(map(math.isfinite, numbers)) and all(value > 0 for value in found.std)
    return found if whole and sound and len(found.mean) == len(found.std) else None


def stored_normalisation(properties: Mapping[str, str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from the properties of a model file; empty where they are not among them."""
    return parse_numbers(properties.get(MEAN_KEY, "")), parse_numbers(properties.get(STD_KEY, ""))


def parse_numbers(text: str) -> tuple[float, ...]:
    """`"0.5,0.5"` -> (0.5, 0.5); `OptionError` for anything that is no list of numbers."""
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise OptionError(f"{text!r} is no list of numbers like 0.485,0.456,0.406") from None


def format_numbers(values: Iterable[float]) -> str:
    """(0.5, 0.5) -> `"0.5,0.5"`, from which `parse_numbers` reads the same numbers, to the last bit."""
    return ",".join(repr(value) for value in values)


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _short(values: Sequence[float]) -> str:
    """The values, once where they are all the same."""
    shown = [f"{value:.3g}" for value in values]
    if len(set(shown)) == 1:
        return shown[0]
    return ",".join(shown) if len(shown) <= 4 else f"{','.join(shown[:3])},... ({len(shown)} channels)"
