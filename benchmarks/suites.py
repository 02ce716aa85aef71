"""What is measured: each suite is a list of cases, each case a line of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.models import MODELS
from dreamquant.methods import find_method, method_names
from dreamquant.recipe import load_recipe, resolve
from dreamquant.synthesis import WIDENED


@dataclass(frozen=True)
class Case:
    """One way of quantizing one network. `images` are those of a synthesis method, or `real` ones of its training data's kind."""

    model: str
    label: str
    bits: str
    images: str
    plan: str = "deploy"
    count: int = 64
    options: dict[str, Any] = field(default_factory=dict)  # of the synthesis method
    widen: bool = False  # to four times as many, as the default recipe does
    budget: str = "standard"
    changes: dict[str, Any] = field(default_factory=dict)  # of the plan
    allocation: dict[str, Any] = field(default_factory=lambda: {"method": "uniform"})
    reconstruction: dict[str, Any] = field(default_factory=lambda: {"method": "nearest"})
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class RecipeCase:
    """One recipe on one network, as `dreamquant quantize` runs it."""

    model: str
    recipe: str
    bits: str
    plan: str = "deploy"
    budget: str = "standard"

    @property
    def label(self) -> str:
        return f"{self.recipe}, {self.budget}"


@dataclass(frozen=True)
class SpeedCase:
    """What a step of a synthesis method costs for one image of a network; one thread."""

    model: str
    label: str  # the method
    count: int
    bits: str = "-"
    plan: str = "-"


TENSOR = {"weight_granularity": "tensor"}
DFQ = TENSOR | {"range_source": "batchnorm"}
DREAMER = {"resnet20": "rsd", "resnet56": "rsd", "mobilenetv1": "fractal", "mobilenetv2": "fractal", "squeezenet": "fractal"}


def dfq() -> Iterable[Case]:
    """What equalization and bias correction give back of the accuracy that one grid for a whole weight takes."""
    equalized = {"transforms": ["fold_batchnorm", "equalize"]}
    absorbed = {"transforms": ["fold_batchnorm", "equalize", "absorb_bias"]}
    lines: dict[str, dict[str, Any]] = {
        "per tensor": TENSOR | {"bias_correction": "none"},
        "per tensor, equalized": TENSOR | equalized | {"bias_correction": "none"},
        "per tensor, equalized, absorbed": TENSOR | absorbed | {"bias_correction": "none"},
        "per tensor, bias corrected": TENSOR,
        "per tensor, equalized, bias corrected": TENSOR | equalized,
        "per channel": {"bias_correction": "none"},
        "per channel, bias corrected": {},
        "no samples: per tensor": DFQ | {"bias_correction": "none"},
        "no samples: per tensor, equalized, absorbed, corrected (DFQ)": DFQ | absorbed | {"bias_correction": "batchnorm"},
        "no samples: per channel, corrected": {"range_source": "batchnorm", "bias_correction": "batchnorm"},
    }
    for model in ("mobilenetv2", "mobilenetv1"):
        for label, changes in lines.items():
            yield Case(model, label, "W8A8", "fractal", changes=changes)


def granularity() -> Iterable[Case]:
    """Weights per tensor, per channel, hybrid, on codebooks, and with bits layer by layer."""
    lines: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "per tensor": (TENSOR, {"method": "uniform"}),
        "per channel": ({}, {"method": "uniform"}),
        "hybrid, accuracy": ({}, {"method": "hybrid"}),
        "hybrid, latency": ({}, {"method": "hybrid", "mode": "latency"}),
        "quartiles, per channel": ({"weight_levels": "quartiles"}, {"method": "uniform"}),
        "kmeans, per channel": ({"weight_levels": "kmeans"}, {"method": "uniform"}),
    }
    for model in ("resnet20", "resnet56", "mobilenetv2", "squeezenet"):
        for bits in ("W8A8", "W6A6", "W4A4"):
            for label, (changes, allocation) in lines.items():
                yield Case(model, label, bits, DREAMER[model], changes=changes, allocation=allocation)
        yield Case(model, "mixed, average 4", "W4A8", DREAMER[model], allocation={"method": "mixed", "average": 4.0})
        yield Case(model, "per channel", "W4A8", DREAMER[model])
    fair = 5.66  # what 4 bits come to on average where the plan keeps the last layer, four tenths of the weights, at 8
    yield Case(
        "squeezenet", f"mixed, average {fair}", "W4A8", DREAMER["squeezenet"], allocation={"method": "mixed", "average": fair}
    )


DREAMS: dict[str, dict[str, Any]] = {
    "real": {},
    "genie": {"batch": 64},
    "dsg": {},
    "zeroq": {},
    "rsd": {},
}


def reconstruction() -> Iterable[Case]:
    """Rounding learnt on dreams and on photographs, protocol of BRECQ."""
    for bits in ("W2A4", "W3A3", "W4A4"):
        for images, options in DREAMS.items():
            for method in ("genie_m", "qdrop", "brecq", "adaround"):
                budget = "standard"
                yield Case(
                    "resnet20",
                    f"{method} on {images}",
                    bits,
                    images,
                    plan="brecq",
                    count=256,
                    options=options,
                    budget=budget,
                    reconstruction={"method": method, "budget": budget},
                )
    for images, options in DREAMS.items():
        yield Case("resnet20", f"nearest on {images}", "W2A4", images, plan="brecq", count=256, options=options)


def official() -> Iterable[Case]:
    """Genie as its official code was run on the same weights (128 images, 2,000 steps a unit, batches of 4), beside ours.

    Twice its steps of synthesis take less than its processor seconds.
    """
    published = {"method": "genie_m", "steps": 2000, "batch": 4}
    standard = {"method": "genie_m", "budget": "standard"}
    dreams = {name: ("genie", {"batch": 128, "steps": steps}) for name, steps in (("genie", 600), ("genie in 1,200 steps", 1200))}
    for bits in ("W2A4", "W4A4"):
        for name, (images, options) in (dreams | {"real": ("real", {})}).items():
            for label, settings in (("2,000 steps, batch 4", published), ("standard", standard)):
                yield Case(
                    "resnet20",
                    f"genie_m on 128 {name}, {label}",
                    bits,
                    images,
                    plan="brecq",
                    count=128,
                    options=options,
                    reconstruction=settings,
                )


AUTO = load_recipe("auto")
FEW = resolve(AUTO, has_batchnorm=True, bits="W4A4").quantization.changes
LARGE_FEW = resolve(AUTO, has_batchnorm=True, photographs=True, large=True, bits="W4A4").quantization.changes
MANY = resolve(AUTO, has_batchnorm=True, photographs=True, bits="W8A8").quantization.changes


def reference() -> Iterable[Case]:
    """The default recipe's settings on photographs and on noise, which is what its dreams are measured against."""
    for model in ("resnet20", "resnet56", "mobilenetv1", "squeezenet", "mobilenetv2"):
        for images in ("real", "noise"):
            yield Case(model, f"nearest on {images}", "W8A8", images, changes=MANY)
    yield Case("digits", "nearest on noise", "W8A8", "noise")
    recipes = {"resnet56": ("standard", 128), "resnet20": ("standard", 128), "mobilenetv2": ("quick", 32)}
    for model, (budget, dreams) in (recipes | {"digits": ("standard", 128)}).items():
        for images in ("rsd", "real", "noise") if model != "digits" else ("rsd", "noise"):
            for method in ("nearest", "qdrop"):
                settings = {"method": method} | ({"budget": budget} if method == "qdrop" else {})
                label = f"{method} on {images}" + (", quick" if budget == "quick" else "")
                large = model == "mobilenetv2"
                yield Case(
                    model,
                    label,
                    "W4A4",
                    images,
                    count=WIDENED * dreams if large and images != "rsd" else dreams,
                    widen=large and images == "rsd",
                    budget=budget,
                    changes=LARGE_FEW if large else FEW,
                    reconstruction=settings,
                )


def choices() -> Iterable[Case]:
    """What the default recipe owes to each of its choices: that choice undone, the rest as it is, roundings not learnt."""
    few = {
        "all of them": {},
        "ranges ema": {"activation_ranges": "ema"},
        "no effect_limit": {"effect_limit": None},
        "effect_limit 1": {"effect_limit": 1},
        "elementwise as the rest": {"elementwise_bits": None},
        "second input as the rest": {"second_input_bits": None},
    }
    for model in ("resnet20", "resnet56", "mobilenetv1", "squeezenet", "mobilenetv2"):
        for images in ("fractal", "real"):
            for label, changes in few.items():
                yield Case(model, f"{label}; {images}", "W4A4", images, changes=FEW | changes)
        for bits in ("W8A8", "W6A6"):
            yield Case(model, "all of them; fractal", bits, "fractal", changes=MANY)
            yield Case(model, "ranges ema; fractal", bits, "fractal", changes=MANY | {"activation_ranges": "ema"})
        yield Case(model, "elementwise as the rest; fractal", "W6A6", "fractal", changes=MANY | {"elementwise_bits": None})


def training() -> Iterable[Case]:
    """Training without data beside the same start without it, protocol of ZeroQ."""
    for bits in ("W4A4", "W3A3"):
        yield Case("resnet20", "not trained", bits, "lrq", plan="zeroq", count=256, options=HARD)
        for method in ("lrq", "lrq_generator", "gdfq", "dsg_qat"):
            images = {"dsg_qat": "dsg"}.get(method, "lrq")
            options = HARD if images == "lrq" else {}
            settings = {"method": method, "budget": "standard", "range_epochs": 8}
            yield Case("resnet20", method, bits, images, plan="zeroq", count=256, options=options, training=settings)
        yield Case("resnet20", "not trained, dsg images", bits, "dsg", plan="zeroq", count=256)
        for method in ("lrq", "gdfq", "dsg_qat"):
            kept = {"method": method, "budget": "standard", "range_epochs": 0}
            yield Case("resnet20", f"{method}, dsg images, start's ranges", bits, "dsg", plan="zeroq", count=256, training=kept)


HARD = {"lower": 0.05, "target": 0.95}


def auto() -> Iterable[RecipeCase]:
    """The default recipe on every network of the data folder."""
    for bits in ("W8A8", "W4A4"):
        for model in MODELS:
            if model != "digits":
                yield RecipeCase(model, "auto", bits)
    yield RecipeCase("mobilenetv2", "auto", "W4A4", budget="quick")


RANGES = (("noise", "W8A8"), ("noise", "W4A4"), ("rsd", "W8A8"), ("dfq", "W8A8"), ("ocs", "W4A8"), ("rsd_hybrid", "W6A6"))
MORE = (("rsd_nonuniform", "W4A8"), ("zeroq_mixed", "W4A8"), ("zeroq", "W4A4"), ("dsg", "W4A4"), ("aciq", "W4A4"))
LEARNED = tuple((name, "W4A4") for name in ("adaround", "brecq", "qdrop", "genie", "gdfq", "dsg_qat", "lrq", "lrq_generator"))


def every_recipe(models: Iterable[str], recipes: Iterable[tuple[str, str]], budget: str) -> Iterable[RecipeCase]:
    """Recipes by their own plans; tables never mix these."""
    for model in models:
        for recipe, bits in recipes:
            yield RecipeCase(model, recipe, bits, plan=load_recipe(recipe).quantization.plan, budget=budget)


def cifar() -> Iterable[RecipeCase]:
    """Every published system on ResNet-20 and ResNet-56; the default recipe has a suite of its own."""
    yield from every_recipe(("resnet20", "resnet56"), RANGES + MORE + LEARNED, "quick")


def imagenet() -> Iterable[RecipeCase]:
    """The recipes that make sense at 224x224 on a processor."""
    yield from every_recipe(("mobilenetv1", "squeezenet", "mobilenetv2"), (("noise", "W8A8"), ("rsd", "W8A8")), "quick")
    yield from every_recipe(("mobilenetv1", "mobilenetv2"), (("dfq", "W8A8"), ("ocs", "W8A8")), "quick")


def digits() -> Iterable[RecipeCase]:
    """Every recipe on the network that ships with the project: needs no data folder, and minutes."""
    yield from every_recipe(("digits",), (("auto", "W8A8"), ("auto", "W4A4"), *RANGES, *MORE), "standard")
    yield from every_recipe(("digits",), LEARNED, "quick")


def speed() -> Iterable[SpeedCase]:
    """A step of every synthesis method, processor milliseconds for one image."""
    for model, count in (("resnet20", 64), ("mobilenetv1", 16), ("mobilenetv2", 8)):
        for name in method_names("synthesis"):
            if "steps" in find_method("synthesis", name).options and name != "psaq":
                yield SpeedCase(model, name, count)


def trust() -> Iterable[Case]:
    """Good and bad quantizations of every network, to hold the estimate of lost accuracy against."""
    for model in ("digits", "resnet20", "resnet56", "mobilenetv1", "squeezenet", "mobilenetv2"):
        for images in ("fractal", "noise"):
            for bits in ("W8A8", "W6A6", "W5A5", "W4A8", "W4A4"):
                yield Case(model, f"nearest on {images}", bits, images)
    for model in ("resnet20", "resnet56", "mobilenetv1", "squeezenet", "mobilenetv2"):
        yield Case(model, "nearest on real", "W8A8", "real")


def folded() -> Iterable[Case]:
    """Networks without BatchNorm on images that ask no network, with min-max ranges and with what better ranges give back."""
    ranges = {"activation_ranges": "percentile", "bias_correction": "samples"}
    least = ranges | {"activation_ranges": "mse"}
    yield Case("mobilenetv1_bnfolded", "fractal, least error, biases corrected", "W8A8", "fractal", plan="zeroq", changes=least)
    for model in ("mobilenetv1_bnfolded", "resnet20_bnfolded", "squeezenet", "mobilenetv2_bnfolded"):
        for label, changes in (("min-max", {}), ("percentile, biases corrected", ranges)):
            for bits in ("W8A8", "W6A6"):
                yield Case(model, f"fractal, {label}", bits, "fractal", plan="zeroq", changes=changes)
    for bits in ("W8A8", "W6A6"):
        for images, count in (("fractal", 256), ("anchored", 64)):
            label = f"{count} {images}, percentile, biases corrected"
            yield Case("mobilenetv1_bnfolded", label, bits, images, plan="zeroq", count=count, changes=ranges)


SUITES: dict[str, Callable[[], Iterable[Case | RecipeCase | SpeedCase]]] = {
    "dfq": dfq,
    "granularity": granularity,
    "reconstruction": reconstruction,
    "official": official,
    "reference": reference,
    "choices": choices,
    "training": training,
    "auto": auto,
    "cifar": cifar,
    "imagenet": imagenet,
    "digits": digits,
    "speed": speed,
    "trust": trust,
    "folded": folded,
}
