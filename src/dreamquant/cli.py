"""The command line: one more caller of `run`, `synthesize`, `evaluate` and `load`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.table import Table

import dreamquant
from dreamquant.assess.compare import COUNT
from dreamquant.assess.compare import compare as compare_files
from dreamquant.assess.dreams import measure
from dreamquant.assess.evaluate import evaluate as evaluate_run
from dreamquant.assess.evaluate import torch_runner
from dreamquant.assess.labelled import load_labelled
from dreamquant.errors import DreamQuantError, OptionError, unknown
from dreamquant.methods import FAMILIES, find_method, method_names
from dreamquant.network.attention import attentions
from dreamquant.network.graph import Network
from dreamquant.network.load import MEAN_KEY, STD_KEY, load, parse_numbers
from dreamquant.network.onnx_import.interface import image_input
from dreamquant.network.operators import WEIGHTED, is_call
from dreamquant.network.segments import segments
from dreamquant.network.statistics import batch_norms
from dreamquant.quantization.plan import load_plan, parse_bits
from dreamquant.quantization.sites import activation_sites
from dreamquant.quantization.student import transformed
from dreamquant.recipe import load_recipe, recipe_names
from dreamquant.report import check_report, write_report
from dreamquant.run import ranked, run
from dreamquant.runtime import onnx_runner
from dreamquant.storage import FORMATS, check_pixels, check_samples_path, read_samples, write_samples
from dreamquant.synthesis import lacking
from dreamquant.terminal import announce, console, print_comparison, print_dreams, print_inspection, print_result, progress_bars

FAILED, INTERRUPTED = 2, 130
TOOLS = ("modelopt",)  # that want their calibration images written in a way of their own

app = typer.Typer(
    help="Quantize a trained neural network when its training data may not be touched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="a .onnx or .pt2 file, package.module:callable, path.py:callable or timm:NAME")]
Shape = Annotated[str | None, typer.Option("--input-shape", help="size of the images, where the model does not tell it: C,H,W")]
Mean = Annotated[str | None, typer.Option(help="what is subtracted from pixels in 0..1, one number a channel: a,b,c")]
Std = Annotated[str | None, typer.Option(help="what they are then divided by: a,b,c")]
Seed = Annotated[int, typer.Option(help="same seed, same bits, on one machine")]
Labels = Annotated[Path | None, typer.Option(help="csv with columns `file` and the label column")]
LabelColumn = Annotated[str, typer.Option(help="the csv's column of class numbers")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress")]


def main() -> None:
    """Run the command line; errors that a user can cause are one line and exit status 2."""
    try:
        app()
    except DreamQuantError as error:
        _fail(str(error))
    except SystemExit as end:  # typer makes one of a Ctrl-C, without a word
        if end.code == INTERRUPTED:
            print("dreamquant: interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        raise


def _fail(message: str) -> NoReturn:
    print(f"dreamquant: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(FAILED)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write: .onnx")],
    recipe: Annotated[str, typer.Option(help="a recipe's name (see `recipes`) or a .toml file")] = "auto",
    bits: Annotated[str | None, typer.Option(help="bits of weights and activations: W8A8, W4A4, ...")] = None,
    plan: Annotated[str | None, typer.Option(help="what is quantized: deploy, zeroq, brecq or a .toml file")] = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    budget: Annotated[str, typer.Option(help="quick, standard or paper")] = "standard",
    keep_float: Annotated[list[str] | None, typer.Option(help="a layer to leave in float (names: `inspect`)")] = None,
    bits_for: Annotated[
        list[str] | None, typer.Option(help="a layer with bits of its own: NAME=8 for weights and input, or NAME=W4A8")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="percent: raise the worst layers until so many top-1 answers are the float network's")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="stage.option=value, e.g. synthesis.steps=200")] = None,
    seed: Seed = 0,
    report: Annotated[Path | None, typer.Option(help="an .html file to write: what came of it, as one page to decide by")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="keep samples and result there; a run that was stopped goes on")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="tell the loss of accuracy from the answers on more images")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL without data and prove the file that is written."""
    if report is not None:
        check_report(report, model=model, output=output)
    chosen = [f"quantization.layers.{name}.keep_float=true" for name in keep_float or []]
    chosen += [setting for text in bits_for or [] for setting in _layer_settings(text)]
    if agreement is not None:
        chosen += ["allocation.method=auto", f"allocation.agreement={agreement}"]
    with progress_bars(quiet or as_json) as progress:
        result = run(
            model,
            output,
            recipe=recipe,
            bits=bits,
            plan=plan,
            budget=budget,
            settings=chosen + (settings or []),
            input_shape=_shape(input_shape),
            mean=_numbers(mean),
            std=_numbers(std),
            seed=seed,
            run_dir=run_dir,
            estimate=estimate,
            progress=progress,
            announce=None if quiet or as_json else announce,
        )
        if report is not None:
            write_report(result, report, command=["dreamquant", *sys.argv[1:]], progress=progress)
    if as_json:
        print(json.dumps(result.summary(), indent=2))  # noqa: T201
    else:
        print_result(result, report)


@app.command()
def synthesize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help=f"the file to write: {', '.join(FORMATS)}; without a suffix, a folder of PNGs")
    ],
    method: Annotated[str, typer.Option(help="a synthesis method (see `methods`)")] = "rsd",
    count: Annotated[int, typer.Option("--count", "-n", help="how many images")] = 64,
    budget: Annotated[str, typer.Option(help="quick, standard or, as published, paper")] = "standard",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="an option of the method: name=value")] = None,
    seed: Seed = 0,
    tool: Annotated[
        str | None, typer.Option("--for", help="modelopt: an .npz of the images alone, under the name of the model's input")
    ] = None,
    input_name: Annotated[str | None, typer.Option(help="that name, where MODEL is no .onnx file to take it from")] = None,
    quiet: Quiet = False,
) -> None:
    """Let MODEL dream images and write them."""
    if tool is not None and tool not in TOOLS:
        raise OptionError(unknown("tool", tool, TOOLS))
    if tool and not input_name and not model.endswith(".onnx"):
        raise OptionError(f"{model} is no .onnx file, so the name that {tool} knows its input by must be given: --input-name")
    named = bool(tool or input_name)
    check_samples_path(output, inputs=[Path(model)] if Path(model).is_file() else [], named=named)
    options: dict[str, Any] = {}
    for setting in settings or []:
        name, separator, value = setting.partition("=")
        if not separator:
            raise OptionError(f"{setting!r} is no setting; write name=value, as in steps=200")
        options[name.removeprefix("synthesis.")] = value
    options = find_method("synthesis", method).check_options(options)
    network = load(model, input_shape=_shape(input_shape), mean=_numbers(mean), std=_numbers(std))
    if not output.suffix:
        check_pixels(network)
    if named:
        _check_whole_batches(network, count)
    with progress_bars(quiet) as progress:
        samples = dreamquant.synthesize(
            network,
            count,
            method=method,
            seed=seed,
            budget=budget,
            callback=lambda done, total, loss: progress("dreaming images", done, total, loss),
            **options,
        )
    write_samples(samples, network, output, input_name=(input_name or network.input_name) if named else "")
    console(stderr=True).print(f"{len(samples)} images by {method} -> {output}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        Path, typer.Argument(help="a folder with one sub-folder a class, a folder or .zip with --labels, or an .npz")
    ],
    labels: Labels = None,
    label_column: LabelColumn = "label",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    batch: Annotated[int, typer.Option(help="images at once")] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Accuracy of MODEL on labelled images; an ONNX file, quantized or not, is run in ONNX Runtime as it is."""
    images = load_labelled(data, labels=labels, label_column=label_column)
    given_mean, given_std, shape = _numbers(mean), _numbers(std), _shape(input_shape)
    if bool(given_mean) != bool(given_std):
        raise OptionError("--mean and --std belong together: give both or none")
    if model.endswith(".onnx"):
        runner = onnx_runner(Path(model))
        shape = shape or _known_shape(runner.input_shape, model)
        given_mean = given_mean or parse_numbers(runner.metadata.get(MEAN_KEY, ""))
        given_std = given_std or parse_numbers(runner.metadata.get(STD_KEY, ""))
        function: Any = runner
    else:
        network = load(model, input_shape=shape, mean=given_mean, std=given_std)
        shape, given_mean, given_std, function = network.input_shape, network.mean, network.std, torch_runner(network)
    if not given_mean or not given_std:
        raise OptionError(f"{model} does not store how pixels are normalised: give --mean and --std")
    with progress_bars(quiet or as_json) as progress:
        found = evaluate_run(
            function,
            images,
            input_shape=shape,
            mean=given_mean,
            std=given_std,
            batch=batch,
            callback=lambda done, total: progress("evaluating", done, total, 0.0),
        )
    if as_json:
        values = {"top1": found.top1, "top5": found.top5, "images": found.images, "seconds": found.seconds}
        print(json.dumps(values))  # noqa: T201
    else:
        console().print(f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.images} images, {found.seconds:.1f} s")


@app.command()
def dreams(
    model: Model,
    samples: Annotated[Path, typer.Argument(help="a .safetensors or .npz file that `synthesize` wrote")],
    data: Annotated[Path | None, typer.Option(help="real images to compare ranges with, as `evaluate` takes them")] = None,
    labels: Labels = None,
    label_column: LabelColumn = "label",
    plan: Annotated[str, typer.Option(help="the plan whose tensors are compared")] = "zeroq",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Measure the images in SAMPLES: distance to MODEL's BatchNorms, diversity, classes and, against real images, ranges."""
    chosen, dreamt = load_plan(plan), read_samples(samples)
    if labels is not None and data is None:
        raise OptionError(f"{labels} are labels of images, and there are none: give --data")
    images = None if data is None else load_labelled(data, labels=labels, label_column=label_column).spread(len(dreamt))
    network = load(model, input_shape=_shape(input_shape), mean=_numbers(mean), std=_numbers(std))
    real = None
    if images is not None:
        if not network.mean:
            raise OptionError(f"{model} does not store how pixels are normalised: give --mean and --std")
        batches = images.batches(len(images), input_shape=network.input_shape, mean=network.mean, std=network.std)
        real = torch.from_numpy(next(batches)[0])
    found = measure(network, dreamt, real=real, plan=chosen)
    if as_json:
        print(json.dumps(asdict(found), indent=2))  # noqa: T201
    else:
        print_dreams(found)


@app.command()
def inspect(
    model: Model,
    input_shape: Shape = None,
    plan: Annotated[str, typer.Option(help="the plan whose sites are shown")] = "deploy",
    bits: Annotated[str, typer.Option(help="the bits whose sites are shown")] = "W8A8",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="rank layers by the damage that each alone does on images the network dreams")
    ] = False,
    recipe: Annotated[str, typer.Option(help="the recipe that dreams them")] = "auto",
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show MODEL's layers, BatchNorms, segments, what a plan quantizes, which methods can work on it and which layers hurt."""
    chosen, width, dreamer = load_plan(plan), parse_bits(bits), load_recipe(recipe)
    network = load(model, input_shape=_shape(input_shape), mean=_numbers(mean), std=_numbers(std))
    graph = network.graph.graph
    quantized = transformed(network, chosen, width)
    norms, mixing = batch_norms(network), attentions(network)
    lacks = {name: lacking(find_method("synthesis", name), network) for name in method_names("synthesis")}
    found = {
        "model": network.source.text,
        "input_shape": network.input_shape,
        "batch": network.batch,
        "layers": [
            {
                "name": node.name,
                "operator": str(node.target),
                "weight": node.args[1].meta["shape"],
                "output": node.meta["shape"][1:],
            }
            for node in graph.nodes
            if is_call(node, WEIGHTED)
        ],
        "batch_norms": [{"name": norm.name, "channels": len(norm.mean)} for norm in norms],
        "attentions": [{"output": layer.output.name, "patches": layer.patches} for layer in mixing],
        "segments": [
            {
                "input": segment.input.name,
                "output": segment.output.name,
                "layers": [node.name for node in segment.layers],
            }
            for segment in segments(network)
        ],
        "sites": [
            {"tensor": site.node.name, "bits": site.bits, "grid_of": site.root.name}
            for site in activation_sites(quantized.graph.graph, chosen, width)
        ],
        "synthesis": {name: not what for name, what in lacks.items()},
    }
    if sensitivity:
        with progress_bars(quiet or as_json) as progress:
            found["sensitivity"] = [asdict(layer) for layer in ranked(network, dreamer, chosen, width, seed, progress)]
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201
    else:
        print_inspection(found, lacks)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.onnx", help="an ONNX file of any tool, the one that B is measured against")],
    b: Annotated[Path, typer.Argument(metavar="B.onnx", help="another, for the same images")],
    samples: Annotated[
        Path | None, typer.Option(help="compare outputs on these: a .safetensors or .npz file that `synthesize` wrote")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="or on real images, as `evaluate` takes them; labels, where there are any, give accuracy")
    ] = None,
    labels: Labels = None,
    label_column: LabelColumn = "label",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    count: Annotated[int, typer.Option("--count", "-n", help="procedural images, where neither is given")] = COUNT,
    batch: Annotated[int | None, typer.Option(help="images at once when timed; without it 1, or what the files take")] = None,
    threads: Annotated[int, typer.Option(help="threads inside one operator")] = 1,
    rounds: Annotated[int, typer.Option(help="how often each file is timed, in turns")] = 20,
    seed: Annotated[int, typer.Option(help="of procedural images")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two ONNX files in ONNX Runtime: size, layers, latency, every output and, where there are labels, accuracy."""
    if labels is not None and data is None:
        raise OptionError(f"{labels} are labels of images, and there are none: give --data")
    given_mean, given_std = _numbers(mean), _numbers(std)
    if bool(given_mean) != bool(given_std):
        raise OptionError("--mean and --std belong together: give both or none")
    with progress_bars(quiet or as_json) as progress:
        found = compare_files(
            a,
            b,
            samples=None if samples is None else read_samples(samples),
            data=None if data is None else load_labelled(data, labels=labels, label_column=label_column, required=False),
            input_shape=_shape(input_shape),
            mean=given_mean,
            std=given_std,
            count=count,
            batch=batch,
            threads=threads,
            rounds=rounds,
            seed=seed,
            callback=lambda done, total: progress("comparing", done, total, 0.0),
        )
    if as_json:
        print(json.dumps(asdict(found), indent=2))  # noqa: T201
    else:
        print_comparison(found)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    found = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print(json.dumps([recipe.model_dump(exclude_none=True) for recipe in found], indent=2))  # noqa: T201
        return
    table = Table("recipe", "what it does", "paper")
    for recipe in found:
        table.add_row(recipe.name, recipe.summary, recipe.paper)
    console().print(table)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods of every family, with their options."""
    if as_json:
        print(json.dumps({family: method_names(family) for family in FAMILIES}, indent=2))  # noqa: T201
        return
    table = Table("family", "method", "what it does", "options")
    for family in FAMILIES:
        for name in method_names(family):
            method = find_method(family, name)
            options = ", ".join(f"{key}={parameter.default}" for key, parameter in method.options.items())
            table.add_row(family, name, method.summary, options)
    console().print(table)


def _layer_settings(text: str) -> list[str]:
    """`"conv2d_3=8"` or `"conv2d_3=W8A8"` as settings of a recipe."""
    name, separator, width = text.partition("=")
    if not separator or not name:
        raise OptionError(f"--bits-for is {text!r}; write NAME=8 or NAME=W4A8")
    bits = parse_bits(f"W{width}A{width}" if width.isdecimal() else width)
    place = f"quantization.layers.{name}"
    return [f"{place}.weight_bits={bits.weights}", f"{place}.input_bits={bits.activations}"]


def _check_whole_batches(network: Network, count: int) -> None:
    """Another tool feeds an ONNX file the batches that it declares, where this package may be able to run any."""
    proto = network.source.proto
    batch = network.batch if proto is None else image_input(proto.graph, network.source.text, network.input_shape)[2]
    if count % (batch or 1):
        raise OptionError(f"{network.source.text} takes batches of {batch}, and {count} images are no whole number of them")


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--input-shape is {text!r}; write three whole numbers above 0: C,H,W as in 3,224,224")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def _numbers(text: str | None) -> tuple[float, ...] | None:
    return None if text is None else parse_numbers(text)


def _known_shape(shape: tuple[int | None, int | None, int | None], model: str) -> tuple[int, int, int]:
    channels, height, width = shape
    if channels is None or height is None or width is None:
        raise OptionError(f"{model} leaves the size of its images open: give --input-shape C,H,W")
    return channels, height, width
