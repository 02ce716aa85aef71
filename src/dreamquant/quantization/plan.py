"""Plans: which tensors get how many bits, for which runtime or protocol. A plan is a TOML file in `plans/`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dreamquant import shelf
from dreamquant.errors import OptionError, unknown

SMALLEST_BITS, LARGEST_BITS = 2, 8
WIDTHS = (*range(SMALLEST_BITS, LARGEST_BITS + 1), 16)  # bits that a number may have
KNOWN_WIDTHS = "2 to 8, or 16"
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
    """`"W4A8"` -> Bits(4, 8); `OptionError` for anything else than W and A with 2 to 8 or 16 bits each."""
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", text.strip())
    if match is None:
        raise OptionError(f"bits are {text!r}; write them as W8A8: W and A with {KNOWN_WIDTHS} bits each")
    weights, activations = (int(number) for number in match.groups())
    for name, number in (("weights", weights), ("activations", activations)):
        if number not in WIDTHS:
            raise OptionError(f"bits are {text!r}: {number} bits for {name} is not possible; known: {KNOWN_WIDTHS}")
    return Bits(weights=weights, activations=activations)


def _known_width(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"known: {KNOWN_WIDTHS}")
    return bits


Width = Annotated[int, AfterValidator(_known_width)]


Operator = Literal["conv", "conv_transpose", "linear"]  # that have weights
FixedOperator = Literal["sigmoid", "hard_sigmoid", "softmax", "log_softmax", "tanh"]
Rule = Literal[
    "form",
    "types",
    "zero_points",
    "narrow_weights",
    "scales",
    "granularity",
    "bias",
    "fixed",
    "ties",
    "placement",
    "too_small",
    "saturation_free",
    "static_shapes",
]
Tie = Literal["moves", "concat", "average", "resize", "elementwise"]


class LayerPlan(BaseModel):
    """What one layer has of its own; what is left out is as in the rest of the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weight_bits: Width | None = None
    input_bits: Width | None = None
    granularity: Literal["tensor", "channel"] | None = None
    keep_float: bool = False  # neither weights nor bias are quantized, nor tensors that only such layers read


class Fixed(BaseModel):
    """The grid that a target gives the results of one operator, whatever they are: the scale is 1 / `steps`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    operator: FixedOperator
    bits: Width
    steps: float = Field(gt=0)
    zero_point: int


class Target(BaseModel):
    """A runtime or device that a plan is named after, and what it asks of a file beside what is done to each tensor.

    `source` says where the rules were read. `proven` is for ONNX Runtime itself, which every file is proven in; what is for
    others conforms to rules.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    runtime: str
    source: str
    proven: bool = False
    bits: str = "W8A8"  # where none are asked for
    weight_bits: list[Width] = list(WIDTHS)
    activation_bits: list[Width] = list(WIDTHS)
    static_shapes: bool = False
    rules: list[Rule] = list(get_args(Rule))  # that it holds a file to, as the plan has them


# fields of a plan that are what its target asks for, and cannot be changed
ASKED = (
    "placement",
    "quantize_image",
    "activation_sign",
    "activation_zero_point",
    "minimum_range",
    "scales",
    "ties",
    "fixed",
    "per_tensor",
    "weight_symmetric",
    "weight_narrow",
    "weight_levels",
    "channel_bits",
    "saturation_free",
    "bias",
    "float_below_channels",
    "target",
)
WIDTH_FIELDS = {
    "weight_bits": ("first_weight_bits", "last_weight_bits"),
    "activation_bits": ("image_bits", "second_input_bits", "last_input_bits", "elementwise_bits"),
}


class Plan(BaseModel):
    """What is quantized, and how. Fields left out of a plan's file take the defaults given here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    transforms: list[str] = ["fold_batchnorm"]  # of the float network, in this order
    transform_options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # by the transform's name
    # activations
    # integer: what lies between layers that run in integers; inputs: what layers, sums and poolings read, for them alone;
    # every_tensor: all there is, constants too
    placement: Literal["integer", "activation_outputs", "layer_inputs", "inputs", "every_tensor"] = "integer"
    quantize_image: bool = True
    merge_activations: bool = False  # leave the tensor between a convolution and its LeakyReLU, SiLU, ... in float
    activation_sign: Literal["unsigned", "signed"] = "unsigned"  # of their integers; signed ones have the same levels
    # the integer that stands for 0. none: 0 itself, of signed ones; middle: of the range; ends: the least where no value is
    # negative, else the middle
    activation_zero_point: Literal["free", "none", "ends", "middle"] = "free"
    minimum_range: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # from the least level to the largest
    scales: Literal["float", "power_of_two"] = "float"  # of activations and weights
    # what shares a grid. moves: what rearranges values, and poolings that choose some, with what they read; average, resize:
    # poolings that average, and interpolations, likewise; concat: all that is joined; elementwise: the sides of sums, products
    ties: list[Tie] = ["moves", "concat"]
    fixed: list[Fixed] = Field(default_factory=list)
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
    per_tensor: list[Operator] = Field(default_factory=list)  # layers whose weights have one scale whatever the granularity
    weight_symmetric: bool = True
    weight_narrow: bool = False  # without the least integer: -127 to 127
    weight_ranges: str = "minmax"
    weight_options: dict[str, Any] = Field(default_factory=dict)
    weight_levels: str = "uniform"  # or a codebook method: levels at any distance
    level_options: dict[str, Any] = Field(default_factory=dict)
    channel_bits: bool = False  # each channel has its own number of bits, their mean being the layer's
    saturation_free: bool = False  # 8-bit weights that 16-bit sums of products cannot overflow on (see `quantize`)
    # biases
    # int32: on the grid of input scale times weight scale; int8: on a grid of its own; float: left as it is
    bias: Literal["int32", "int8", "float"] = "int32"
    # each output channel's mean error is taken off its bias: measured on samples, as far as it is the same from image to image;
    # or expected from BatchNorm statistics, where layers without a bias of their own, or whose mean input is not known, are left
    # as they are; outputs: on samples, where that brings the outputs nearer
    bias_correction: Literal["none", "samples", "batchnorm", "outputs"] = "none"
    float_below_channels: int = Field(default=0, ge=0)  # layers of fewer channels stay in float (see `sites.too_small`)
    # exceptions; None: as everything else
    first_weight_bits: Width | None = None
    last_weight_bits: Width | None = None
    image_bits: Width | None = None
    second_input_bits: Width | None = None
    last_input_bits: Width | None = None
    # what no weight multiplies: inputs of residual adds, of products of two tensors, and of activation functions that no runtime
    # merges into the layer before; where a layer reads such a tensor too, it does so in its own bits
    elementwise_bits: Width | None = None
    layers: dict[str, LayerPlan] = Field(default_factory=dict)  # by the layer's name, as `inspect` shows it
    target: Target | None = None

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.scales == "power_of_two" and (self.saturation_free or self.channel_bits):
            raise ValueError("scales that are powers of two go with neither saturation_free nor channel_bits")
        return self

    def layer(self, name: str) -> LayerPlan:
        """What the layer has of its own."""
        return self.layers.get(name, _AS_THE_REST)


_AS_THE_REST = LayerPlan()


def plan_names() -> list[str]:
    """The names of the plans that ship with the package."""
    return shelf.names(*PLANS)


def target_names() -> list[str]:
    """The names of those that are targets'."""
    return [name for name in plan_names() if "target" in _read(name)]


def load_plan(name: str, /, **changes: object) -> Plan:
    """A plan by its name or from a TOML file, with some fields changed.

    `OptionError` names what is not known, and what the plan's target does not let be changed.
    """
    fields = _read(name)
    _check_changes(_plan(name, fields), changes)
    return _plan(name, fields | changes)


def _check_changes(plan: Plan, changes: dict[str, Any]) -> None:
    refused = forbidden(plan, changes)
    if refused:
        raise OptionError(f"plan {plan.name}: {', '.join(refused)} cannot be changed, the target asks for what there is")


def forbidden(plan: Plan, changes: Mapping[str, Any]) -> list[str]:
    """Those of a plan's fields that may not be changed so, as its target asks for another value; none where it has no target."""
    if plan.target is None:
        return []
    found = [name for name in changes if name in ASKED and changes[name] != getattr(plan, name)]
    for known, names in WIDTH_FIELDS.items():
        found += [name for name in names if changes.get(name) not in (None, getattr(plan, name), *getattr(plan.target, known))]
    if plan.placement == "every_tensor":
        found += [
            name for name in ("spare", "float_tensors", "merge_activations") if changes.get(name) not in (None, "none", [], False)
        ]
    return found


def _read(name: str) -> dict[str, Any]:
    """The fields of a plan's file, over those of another that it names as its `base`, which is one that ships."""
    fields = shelf.read("plan", name, *PLANS)
    base = fields.pop("base", None)
    if base is None:
        return fields
    if base not in plan_names():
        raise OptionError(f"plan {name}: base: " + unknown("plan", str(base), plan_names()))
    under = _read(base)
    if "target" in fields and "target" in under:
        fields["target"] = under["target"] | fields["target"]
    return under | fields


def load_target(name: str) -> Plan:
    """A plan that is named after a target; `OptionError` for any other."""
    plan = load_plan(name)
    if plan.target is None:
        raise OptionError(f"plan {name} is no target's; targets: {', '.join(target_names())}")
    return plan


def check_bits(plan: Plan, bits: Bits) -> None:
    """`OptionError` where the target that a plan is named after has no such widths."""
    if plan.target is None:
        return
    for what, number, known in (
        ("weights", bits.weights, plan.target.weight_bits),
        ("activations", bits.activations, plan.target.activation_bits),
    ):
        if number not in known:
            raise OptionError(f"{plan.name} has no {number}-bit {what}; bits are {bits}, known: {', '.join(map(str, known))}")


def keep_in_float(plan: Plan, tensors: Iterable[str]) -> Plan:
    """The plan with these tensors, by their grids' names, in float too, and no ranges for any that is."""
    kept = list(dict.fromkeys([*plan.float_tensors, *tensors]))
    own = {name: method for name, method in plan.tensor_ranges.items() if name not in kept}
    return change_plan(plan, float_tensors=kept, tensor_ranges=own)


def change_plan(plan: Plan, /, **changes: object) -> Plan:
    """A plan with some fields changed; `OptionError` names what is not known, and what its target does not let be changed."""
    _check_changes(plan, changes)
    return _plan(plan.name, plan.model_dump() | changes)


def _plan(name: str, fields: dict[str, Any]) -> Plan:
    try:
        return Plan(**fields)
    except ValidationError as error:
        raise shelf.complaint(f"plan {name}", error, Plan.model_fields) from None
