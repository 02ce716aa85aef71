"""Resize: onto torch's upsampling where both compute the same, by plain indexing for every other nearest mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from dreamquant.errors import ModelError
from dreamquant.limits import check_memory
from dreamquant.network.onnx_import.builder import FLOAT_BYTES, Op, label, operator

aten = torch.ops.aten

Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

TORCH_NEAREST = {1: aten.upsample_nearest1d.vec, 2: aten.upsample_nearest2d.vec}
SMOOTH = {
    ("linear", 1): aten.upsample_linear1d.vec,
    ("linear", 2): aten.upsample_bilinear2d.vec,
    ("cubic", 2): aten.upsample_bicubic2d.vec,
}
CENTRES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
_TRIED_PIXELS = 4  # for each pixel: where torch and where ONNX take it from, by row and column
PLAIN = {"antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"}


@dataclass(frozen=True)
class Sizes:
    """The spatial sizes before and after; `scales` where the file gives these instead of sizes."""

    before: list[int]
    after: list[int]
    scales: list[float] | None

    @property
    def ratios(self) -> list[float]:
        """How much longer each dimension gets, as ONNX's coordinates reckon with."""
        return self.scales or [after / before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def torch(self) -> tuple[list[int] | None, list[float] | None]:
        """Torch's arguments: sizes or scale factors."""
        return (self.after, None) if self.scales is None else (None, self.scales)


@operator("Resize")
def resize(op: Op) -> fx.Node:
    for name, default in PLAIN.items():
        if op.attribute(name, default) != default:
            op.refuse(f"attribute {name}={op.attribute(name)!r}; only {default!r} is known")
    sizes = _sizes(op)
    if op.attribute("mode", "nearest") == "nearest":
        return _nearest(op, sizes)
    return _smooth(op, sizes)


def _sizes(op: Op) -> Sizes:
    given: dict[int, Any] = {i: op.known(i).ravel().tolist() for i in (2, 3) if op.has(i) and op.known(i).size}
    axes = [axis % op.rank() for axis in op.attribute("axes", range(op.rank()))]
    before, after, scales = list(op.shape(0)), list(op.shape(0)), [1.0] * op.rank()
    for position, axis in enumerate(axes):
        if 3 in given:
            after[axis] = given[3][position]
        else:
            scales[axis] = given[2][position]
            after[axis] = math.floor(before[axis] * scales[axis])
    if before[:2] != after[:2] or op.rank() not in (3, 4):
        op.refuse(f"it resizes {tuple(before)} to {tuple(after)}; only the last one or two dimensions of images are known")
    needed = FLOAT_BYTES * (math.prod(after) + _TRIED_PIXELS * math.prod(after[2:]))
    check_memory(needed, f"{op.builder.model}: node {label(op.node)!r} (Resize) to {tuple(after)}", ModelError)
    return Sizes(before[2:], after[2:], None if 3 in given else scales[2:])


def _smooth(op: Op, sizes: Sizes) -> fx.Node:
    mode = op.attribute("mode", "nearest")
    where = op.attribute("coordinate_transformation_mode", "half_pixel")
    if (mode, len(sizes.before)) not in SMOOTH:
        op.refuse(f"attribute mode={mode!r} on {len(sizes.before)} spatial dimensions; known: linear on 1 or 2, cubic on 2")
    if where not in ("align_corners", *CENTRES) or not _centres_agree(where, sizes):
        op.refuse(
            f"attribute coordinate_transformation_mode={where!r} with mode={mode!r}, from {sizes.before} to "
            f"{sizes.after}, has no torch counterpart; known: half_pixel, pytorch_half_pixel, align_corners"
        )
    if mode == "cubic" and op.attribute("cubic_coeff_a", -0.75) != -0.75:
        op.refuse(f"attribute cubic_coeff_a={op.attribute('cubic_coeff_a')}; only -0.75 is known")
    after, scales = sizes.torch
    return op.call(SMOOTH[mode, len(sizes.before)], op.tensor(0), after, where == "align_corners", scales)


def _centres_agree(where: str, sizes: Sizes) -> bool:
    """Whether torch's rule for pixel centres, which is half_pixel, is this one's for these sizes."""
    if where == "pytorch_half_pixel":
        return all(after > 1 or before == 1 for before, after in zip(sizes.before, sizes.after, strict=True))
    if where == "half_pixel_symmetric":
        exact = [before * ratio for before, ratio in zip(sizes.before, sizes.ratios, strict=True)]
        return all(math.isclose(one, after) for one, after in zip(exact, sizes.after, strict=True))
    return True


def _nearest(op: Op, sizes: Sizes) -> fx.Node:
    indices = [_onnx_indices(op, *one) for one in zip(sizes.before, sizes.after, sizes.ratios, strict=True)]
    target, (after, scales) = TORCH_NEAREST[len(sizes.before)], sizes.torch
    ramps = torch.meshgrid(*[torch.arange(float(size)) for size in sizes.before], indexing="ij")
    picked = [target(ramp[None, None], after, scales)[0, 0] for ramp in ramps]  # which pixels torch would take
    wanted = torch.meshgrid(*[torch.from_numpy(one).float() for one in indices], indexing="ij")
    if all(torch.equal(one, other) for one, other in zip(picked, wanted, strict=True)):
        return op.call(target, op.tensor(0), after, scales)
    node = op.tensor(0)
    for axis, one in enumerate(indices, start=2):
        node = op.call(aten.index_select.default, node, axis, op.constant(f"indices_{axis}", one))
    return node


def _onnx_indices(op: Op, before: int, after: int, ratio: float) -> Indices:
    """Which pixel of a line of `before` each of `after` is taken from."""
    position = _position(op, np.arange(after, dtype=np.float32), before, after, np.float32(ratio))
    rounding = op.attribute("nearest_mode", "round_prefer_floor")
    rounded = {
        "round_prefer_floor": np.ceil(position - 0.5),
        "round_prefer_ceil": np.floor(position + 0.5),
        "floor": np.floor(position),
        "ceil": np.ceil(position),
    }
    if rounding not in rounded:
        op.refuse(f"attribute nearest_mode={rounding!r}; known: {', '.join(rounded)}")
    return np.clip(rounded[rounding], 0, before - 1).astype(np.int64)  # type: ignore[no-any-return]


def _position(op: Op, x: Any, before: int, after: int, ratio: Any) -> Any:
    where = op.attribute("coordinate_transformation_mode", "half_pixel")
    if where == "asymmetric":
        return x / ratio
    if where == "align_corners":
        return x * (before - 1) / (after - 1) if after > 1 else x * 0
    if where == "half_pixel" or (where == "pytorch_half_pixel" and after > 1):
        return (x + 0.5) / ratio - 0.5
    if where != "pytorch_half_pixel":
        op.refuse(
            f"attribute coordinate_transformation_mode={where!r} with mode='nearest'; "
            "known: asymmetric, half_pixel, pytorch_half_pixel, align_corners"
        )
    return x * 0
