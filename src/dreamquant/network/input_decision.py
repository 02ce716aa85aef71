"""Which input space a network has: what is stated, stored, built in and remembered, put together and held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dreamquant.errors import ModelError
from dreamquant.network.graph import Network
from dreamquant.network.input_evidence import Remembered, bias_size, preprocessing, remembered
from dreamquant.network.input_space import (
    GREY_STD,
    PIXELS,
    InputSpace,
    Statement,
    of_pixels,
    of_properties,
    stated,
)

OUTSIDE = 0.05  # of the pixels' range, that a set's mean pixel may seem to lie outside of it
NEAR, NEAR_MEAN = 1.4, 0.35  # how far sets of images are apart: a factor of their deviation, and a part of it for their means
FAINT = 0.02  # a deviation of pixels below which a whole set of images is as good as blank: five levels of 255
TWO_VALUED = 1.1  # times the deviation of pixels that are either black or white: more than that no image has
NEARLY_TWO_VALUED = 0.9  # of it is for print and digits, which are grey; where three channels have it, others fit better
RAW = 10.0  # numbers beyond this are of no normalised space: those of photographs end at about 3
RAW_SPREAD = 255 * GREY_STD  # the deviation of photographs as pixels 0..255
USUAL_ANSWER = 1.5  # times its bias: what a first layer answers with in trained networks, within a power of ten either way
MARGIN = 0.5  # powers of e by which one order of magnitude must be nearer to that than another
USUAL = {"ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # normalisations to look for, of three channels


def decide(network: Network, statement: Statement, properties: Mapping[str, str], *, force: bool = False) -> Network:
    """The network with its input space, from what is stated, what the file's `properties` say, its graph and its BatchNorms.

    Raises `ModelError` where what is stated or stored is contradicted by the network, unless `force` is set: the contradiction
    then stays with the space as its `doubt`.
    """
    channels, source = network.input_shape[0], network.source.text
    found = stated(statement, channels, source) or of_properties(properties, channels) or _built_in(network)
    memory = remembered(network)
    if found is None:
        found = _measured(memory, channels) if memory is not None else InputSpace()
    else:
        against = _contradiction(network, found, memory) if found.mean else ""
        if against and not force:
            raise ModelError(f"{source}: {against}; state another input space, or add --force to go on with this one")
        found = replace(found, doubt=against or found.doubt, bounded=not against)
        if memory is not None:
            found = _confirmed(found, memory)
    if not found.is_known:
        found = replace(found, because=_what_to_state(network))
    form = network.space
    stated_order = statement.channels or found.channels or {1: "gray", 3: ""}.get(channels, "other")
    return replace(network, space=replace(found, layout=form.layout, dtype=form.dtype, channels=stated_order))


def _built_in(network: Network) -> InputSpace | None:
    """The space of the pixels that the graph itself normalises, as far as its numbers tell the pixels' range."""
    inside = preprocessing(network)
    if inside is None:
        return None
    fits = []
    for name, (zero, one) in PIXELS.items():  # pixels as they come, p = x * one + zero, are less a mean and by a std of their own
        mean, std = [m * one + zero for m in inside.mean], [s * one for s in inside.std]
        least = 0.95 if name == "-1..1" else 0.1  # what is centred already is stretched to 0..1 at most, never normalised again
        if all(-OUTSIDE <= m <= 1 + OUTSIDE for m in mean) and all(least <= s <= 1.05 for s in std):
            fits.append(name)
    if len(fits) != 1:
        return None
    zero, one = PIXELS[fits[0]]
    channels = len(inside.mean)
    because = f"its first operations make pixels {fits[0]} into normalised ones"
    return of_pixels((zero,) * channels, (one,) * channels, known="graph", because=because)


def _measured(memory: Remembered, channels: int) -> InputSpace:
    """The space of the numbers that the first BatchNorm remembers, and their range where it can only be that of pixels 0..255.

    Numbers near mean 0 and deviation 1 are taken for standardised.
    """
    because = f"the statistics of its first BatchNorm, {memory.name}"
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    centre, spread = (zeros, ones) if _agrees(memory, zeros, ones) else (memory.mean, (memory.deviation,) * channels)
    pixels = [value / 255 for value in memory.mean]
    raw = max(abs(value) for value in memory.mean) + 2 * memory.deviation > RAW
    known = raw and all(0 <= value <= 1 for value in pixels) and memory.deviation / 255 >= FAINT
    normalisation = (zeros, (1 / 255,) * channels) if known else ((), ())
    return InputSpace(*normalisation, centre, spread, known="measured", because=because, checked=True)


def _contradiction(network: Network, space: InputSpace, memory: Remembered | None) -> str:
    """What the network has against a space of pixels, in words; empty for nothing."""
    if memory is not None:
        return _impossible(space, memory)
    size = bias_size(network)
    if size is None:
        return ""
    spread = sum(space.spread) / len(space.spread)
    rival, what = (1.0, "normalised pixels") if spread > RAW else (RAW_SPREAD, "pixels 0..255")
    fed, other = size * spread, size * rival
    if _strangeness(other) + MARGIN > _strangeness(fed):
        return ""
    return (
        f"{space.numbers()} ({space.because}) make its first layer answer with {fed:.2g} times its bias, and {what} with"
        f" {other:.2g} times, where trained networks have the two alike"
    )


def _strangeness(answer: float) -> float:
    """How far a first layer's answer, in times of its bias, is from what trained networks have, in powers of e."""
    return abs(math.log(max(answer, 1e-12) / USUAL_ANSWER))


def _impossible(space: InputSpace, memory: Remembered) -> str:
    means = [m * s + zero for m, s, zero in zip(memory.mean, space.std, space.mean, strict=True)]
    deviations = [memory.deviation * s for s in space.std]
    mean, deviation = sum(means) / len(means), sum(deviations) / len(deviations)
    most = math.sqrt(max(mean * (1 - mean), 0.01))
    reason = ""
    if min(means) < -OUTSIDE or max(means) > 1 + OUTSIDE:
        reason = "and pixels lie in 0..1"
    elif deviation > TWO_VALUED * most:
        reason = f"and pixels of that mean deviate by {most:.2g} at most"
    elif deviation < FAINT:
        reason = "which are blank"
    elif len(means) == 3 and deviation > NEARLY_TWO_VALUED * most:
        for name, (other_mean, other_std) in USUAL.items():
            pixel = [m * s + zero for m, s, zero in zip(memory.mean, other_std, other_mean, strict=True)]
            if (
                max(abs(p - n) for p, n in zip(pixel, other_mean, strict=True)) < 0.3
                and memory.deviation * other_std[1] < 2 * GREY_STD
            ):
                reason = f"which is nearly black and white only, where {name} mean and std would make them photographs"
    if not reason:
        return ""
    numbers = ",".join(f"{value:.3g}" for value in memory.mean)
    return (
        f"{space.numbers()} ({space.because}) is contradicted by its first BatchNorm, {memory.name}, which was trained on"
        f" numbers of mean {numbers} and deviation {memory.deviation:.3g}: that would be pixels of mean {mean:.3g} and deviation"
        f" {deviation:.3g}, {reason}"
    )


def _agrees(memory: Remembered, centre: Sequence[float], spread: Sequence[float]) -> bool:
    """Whether what is remembered is as near to means and deviations, one a channel, as sets of images are to one another."""
    return all(
        abs(m - c) < NEAR_MEAN * s and 1 / NEAR < memory.deviation / s < NEAR
        for m, c, s in zip(memory.mean, centre, spread, strict=True)
    )


def _confirmed(space: InputSpace, memory: Remembered) -> InputSpace:
    """The space as it is, where the first BatchNorm remembers such images; else with the mean and deviation that it remembers."""
    if _agrees(memory, space.centre, space.spread):
        return replace(space, because=f"{space.because}; as its first BatchNorm confirms", checked=True)
    mean = ",".join(f"{value:.2g}" for value in memory.mean)
    how = f"images get the mean {mean} and deviation {memory.deviation:.2g} that its first BatchNorm remembers"
    spread = (memory.deviation,) * len(memory.mean)
    return replace(space, centre=memory.mean, spread=spread, because=f"{space.because}; {how}", checked=True)


def _what_to_state(network: Network) -> str:
    """What is missing, and what to state, in words."""
    size, hint = bias_size(network), ""
    if size is not None:
        small, large = _strangeness(size), _strangeness(size * RAW_SPREAD)
        if abs(small - large) > MARGIN:
            size_asked = "near 1, not as large as" if small < large else "as large as those of"
            hint = f"; its first biases ask for numbers {size_asked} 0..255"
    return (
        "neither the file nor the graph nor a BatchNorm tells what numbers the network is fed: state it, with --mean and --std"
        " (ImageNet's are 0.485,0.456,0.406 and 0.229,0.224,0.225), with --pixels 0..1, 0..255 or -1..1, or with --pixels none"
        f" for numbers of mean 0 and deviation 1 that are no pixels{hint}"
    )
