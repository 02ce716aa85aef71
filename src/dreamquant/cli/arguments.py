"""What is typed after a command -> what it stands for; `OptionError` for what stands for nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.devices import KNOWN
from dreamquant.errors import OptionError, unknown
from dreamquant.limits import memory_limit
from dreamquant.network.graph import Network
from dreamquant.network.input_space import parse_numbers
from dreamquant.network.onnx_import.interface import image_input
from dreamquant.network.outputs import KINDS
from dreamquant.quantization.plan import parse_bits

TOOLS = ("modelopt",)  # that want their calibration images written in a way of their own

Model = Annotated[str, typer.Argument(help="a .onnx or .pt2 file, package.module:callable, path.py:callable or timm:NAME")]
Shape = Annotated[str | None, typer.Option("--input-shape", help="size of the images, where the model does not tell it: C,H,W")]
Mean = Annotated[str | None, typer.Option(help="what is subtracted from pixels in 0..1, one number a channel: a,b,c")]
Std = Annotated[str | None, typer.Option(help="what they are then divided by: a,b,c")]
Pixels = Annotated[
    str | None,
    typer.Option(
        help="the range of the pixels that are fed, before any mean and std: 0..1, 0..255, -1..1; none: no pixels at all"
    ),
]
Layout = Annotated[str | None, typer.Option(help="how the model takes images: nchw or nhwc")]
Channels = Annotated[str | None, typer.Option(help="what the channels are: rgb, bgr, gray or other")]
Force = Annotated[bool, typer.Option("--force", help="go on with an input space that the model's own statistics contradict")]
Resize = Annotated[
    str,
    typer.Option(help="how real images come to the model's size: cover, letterbox, stretch, or a shorter side to cut from, 256"),
]
Trust = Annotated[bool, typer.Option("--trust-model", help="MODEL is a .pt2 of one's own: code that it holds may run")]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--outputs", help=f"NAME=KIND: what an output is, one of {', '.join(KINDS)}"),
]
Seed = Annotated[int, typer.Option(help="same seed, same bits, on one machine")]
Labels = Annotated[
    Path | None,
    typer.Option(help="a csv with columns `file` and the label column, a folder of masks, or a .json of boxes in COCO's form"),
]
LabelColumn = Annotated[str, typer.Option(help="the csv's column of class numbers, one or several between spaces")]
Blank = Annotated[int | None, typer.Option(help="of sequences: the class that stands for nothing, where labels leave it open")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress")]
Memory = Annotated[float | None, typer.Option(help="GiB that may be asked for; without it, half of the machine's memory")]

Device = Annotated[
    str, typer.Option(help=f"where MODEL computes: {KNOWN} (a GPU where there is one); files are proven on the cpu")
]

Numbers = tuple[float, ...]


def limited(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one more option: how much memory a file, an image or a number of images may ask for."""

    @functools.wraps(command)
    def within(*, memory: float | None, **options: Any) -> None:
        with nullcontext() if memory is None else memory_limit(memory):
            command(**options)

    signature = inspect.signature(command, eval_str=True)
    added = inspect.Parameter("memory", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Memory)
    within.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    within.__annotations__ = {name: entry.annotation for name, entry in within.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return within


# ---- models and images


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """`"3,224,224"` -> (3, 224, 224)."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--input-shape is {text!r}; write three whole numbers above 0: C,H,W as in 3,224,224")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def optional_numbers(text: str | None) -> Numbers | None:
    """What `parse_numbers` makes of a text; None for none."""
    return None if text is None else parse_numbers(text)


def input_options(
    input_shape: str | None,
    mean: str | None,
    std: str | None,
    pixels: str | None,
    layout: str | None,
    channels: str | None,
    outputs: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What is typed of the images that a model is fed and of its outputs, as `load` takes it."""
    return {
        "input_shape": parse_shape(input_shape),
        "mean": optional_numbers(mean),
        "std": optional_numbers(std),
        "pixels": pixels,
        "layout": layout and layout.upper(),
        "channels": channels and channels.lower().replace("grey", "gray"),
    } | ({} if outputs is None else {"outputs": parse_outputs(outputs)})


def parse_outputs(texts: Iterable[str] | None) -> dict[str, str]:
    """`["scores=classes"]` -> {"scores": "classes"}; names of outputs may hold a `=`, kinds do not."""
    found = {}
    for text in texts or []:
        name, separator, kind = text.rpartition("=")
        if not separator or not name:
            raise OptionError(f"--outputs is {text!r}; write NAME=KIND, as in scores=classes (known: {', '.join(KINDS)})")
        found[name] = kind
    return found


def load_images(
    data: Path | None, labels: Path | None, label_column: str, resize: str, *, required: bool = True
) -> LabelledImages | None:
    """The images of `--data`, as `load_labelled` reads them; None where there is no such option."""
    if data is not None:
        return load_labelled(data, labels=labels, label_column=label_column, required=required, resize=resize)
    if labels is not None:
        raise OptionError(f"{labels} are labels of images, and there are none: give --data")
    return None


# ---- settings


def recipe_settings(
    settings: Iterable[str], *, keep_float: Iterable[str], bits_for: Iterable[str], agreement: float | None
) -> list[str]:
    """The settings of a recipe that other options stand for, and behind them, so that they win, those given as such."""
    chosen = [f"quantization.layers.{name}.keep_float=true" for name in keep_float]
    chosen += [setting for text in bits_for for setting in layer_settings(text)]
    if agreement is not None:
        chosen += ["allocation.method=auto", f"allocation.agreement={agreement}"]
    return [*chosen, *settings]


def layer_settings(text: str) -> list[str]:
    """`"conv2d_3=8"` or `"conv2d_3=W8A8"` as settings of a recipe."""
    name, separator, width = text.partition("=")
    if not separator or not name:
        raise OptionError(f"--bits-for is {text!r}; write NAME=8 or NAME=W4A8")
    bits = parse_bits(f"W{width}A{width}" if width.isdecimal() else width)
    place = f"quantization.layers.{name}"
    return [f"{place}.weight_bits={bits.weights}", f"{place}.input_bits={bits.activations}"]


def method_options(settings: Iterable[str]) -> dict[str, str]:
    """`["steps=200"]` or `["synthesis.steps=200"]` -> {"steps": "200"}."""
    options = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise OptionError(f"{setting!r} is no setting; write name=value, as in steps=200")
        options[name.removeprefix("synthesis.")] = value
    return options


# ---- images for other tools


def check_tool(tool: str | None, input_name: str | None, model: str) -> None:
    """`OptionError` unless the tool is known, and the name that it knows the model's input by."""
    if tool is not None and tool not in TOOLS:
        raise OptionError(unknown("tool", tool, TOOLS))
    if tool and not input_name and not model.endswith(".onnx"):
        raise OptionError(f"{model} is no .onnx file, so the name that {tool} knows its input by must be given: --input-name")


def check_whole_batches(network: Network, count: int) -> None:
    """Another tool feeds an ONNX file the batches that it declares, where this package may be able to run any."""
    proto = network.source.proto
    batch = network.batch if proto is None else image_input(proto.graph, network.source.text, network.input_shape).batch
    if count % (batch or 1):
        raise OptionError(f"{network.source.text} takes batches of {batch}, and {count} images are no whole number of them")
