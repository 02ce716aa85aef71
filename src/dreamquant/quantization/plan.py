"""Plans: which tensors get how many bits, for which runtime or protocol. A plan is a TOML file in `plans/`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamquant import shelf
from dreamquant.errors import OptionError

SMALLEST_BITS, LARGEST_BITS = 2, 8
CHOSEN = "outputs"  # for ranges and bias correction: whichever the outputs on samples bear best (`quantization.choice`)
PLANS = ("dreamquant.quantization", "plans")


class Bits(BaseModel):
    """Bits of weights and of activations; written W8A8."""

    model_config = ConfigDict(frozen=True)
    weights: int
    activations: int

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def parse_bits(text: str) -> Bits:
    """`"W4A8"` -> Bits(4, 8); `OptionError` for anything else than W and A with 2 to 8 bits each."""
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", text.strip())
    if match is None:
        raise OptionError(f"bits are {text!r}; write them as W8A8: W and A with {SMALLEST_BITS} to {LARGEST_BITS} bits each")
    weights, activations = (int(number) for number in match.groups())
    for name, number in (("weights", weights), ("activations", activations)):
        if not SMALLEST_BITS <= number <= LARGEST_BITS:
            raise OptionError(
                f"bits are {text!r}: {number} bits for {name} is not possible; known: {SMALLEST_BITS} to {LARGEST_BITS}"
            )
    return Bits(weights=weights, activations=activations)


class LayerPlan(BaseModel):
    """What one layer has of its own; what is left out is as in the rest of the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weight_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    input_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    granularity: Literal["tensor", "channel"] | None = None
    keep_float: bool = False  # neither weights nor bias are quantized, nor tensors that only such layers read


class Plan(BaseModel):
    """What is quantized, and how. Fields left out of a plan's file take the defaults given here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    transforms: list[str] = ["fold_batchnorm"]  # of the float network, in this order
    transform_options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # by the transform's name
    # activations
    placement: Literal["integer", "activation_outputs", "layer_inputs"] = "integer"
    quantize_image: bool = True
    merge_activations: bool = False  # leave the tensor between a convolution and its LeakyReLU, SiLU, ... in float
    activation_symmetric: bool = False
    activation_ranges: str = "minmax"  # or "outputs": those of several methods that the outputs bear best
    activation_options: dict[str, Any] = Field(default_factory=dict)
    tensor_ranges: dict[str, str] = Field(default_factory=dict)  # by the quantizer's name; its method, with its own defaults
    # tensors that stay in float: those named by their quantizers, and "outputs": the few that cost the outputs most by far
    float_tensors: list[str] = Field(default_factory=list)
    spare: Literal["none", "outputs"] = "none"
    keep_scores: bool = False  # a tensor that leads to the outputs through no further layer keeps its full range
    observe: Literal["float", "quantized"] = "float"  # the activations that ranges are found on
    # ranges from samples are narrowed until their error moves the scores, squared, at most so many times as far as that of the
    # best narrower one; None: never
    effect_limit: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    range_source: Literal["samples", "batchnorm"] = "samples"  # batchnorm: mean +- deviations x std, with no sample seen
    deviations: float = Field(default=6.0, gt=0)
    # weights
    weight_granularity: Literal["tensor", "channel"] = "channel"
    weight_symmetric: bool = True
    weight_ranges: str = "minmax"
    weight_options: dict[str, Any] = Field(default_factory=dict)
    weight_levels: str = "uniform"  # or a codebook method: levels at any distance
    level_options: dict[str, Any] = Field(default_factory=dict)
    channel_bits: bool = False  # each channel has its own number of bits, their mean being the layer's
    saturation_free: bool = False  # 8-bit weights that 16-bit sums of products cannot overflow on (see `quantize`)
    # biases
    integer_bias: bool = True  # int32, on the grid of input scale times weight scale
    # each output channel's mean error is taken off its bias: measured on samples, as far as it is the same from image to image;
    # or expected from BatchNorm statistics, where layers without a bias of their own, or whose mean input is not known, are left
    # as they are; outputs: on samples, where that brings the outputs nearer
    bias_correction: Literal["none", "samples", "batchnorm", "outputs"] = "none"
    # exceptions; None: as everything else
    first_weight_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    last_weight_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    image_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    second_input_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    last_input_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    # what no weight multiplies: inputs of residual adds, of products of two tensors, and of activation functions that no runtime
    # merges into the layer before; where a layer reads such a tensor too, it does so in its own bits
    elementwise_bits: int | None = Field(default=None, ge=SMALLEST_BITS, le=LARGEST_BITS)
    layers: dict[str, LayerPlan] = Field(default_factory=dict)  # by the layer's name, as `inspect` shows it

    def layer(self, name: str) -> LayerPlan:
        """What the layer has of its own."""
        return self.layers.get(name, _AS_THE_REST)


_AS_THE_REST = LayerPlan()


def plan_names() -> list[str]:
    """The names of the plans that ship with the package."""
    return shelf.names(*PLANS)


def load_plan(name: str, /, **changes: object) -> Plan:
    """A plan by its name or from a TOML file, with some fields changed; `OptionError` names what is not known."""
    return _plan(name, shelf.read("plan", name, *PLANS) | changes)


def keep_in_float(plan: Plan, tensors: Iterable[str]) -> Plan:
    """The plan with these tensors, by their grids' names, in float too, and no ranges for any that is."""
    kept = list(dict.fromkeys([*plan.float_tensors, *tensors]))
    own = {name: method for name, method in plan.tensor_ranges.items() if name not in kept}
    return change_plan(plan, float_tensors=kept, tensor_ranges=own)


def change_plan(plan: Plan, /, **changes: object) -> Plan:
    """A plan with some fields changed; `OptionError` names what is not known."""
    return _plan(plan.name, plan.model_dump() | changes)


def _plan(name: str, fields: dict[str, Any]) -> Plan:
    try:
        return Plan(**fields)
    except ValidationError as error:
        raise shelf.complaint(f"plan {name}", error, Plan.model_fields) from None
