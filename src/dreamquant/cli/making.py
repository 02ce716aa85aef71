"""The commands that make files: `quantize` and `synthesize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import dreamquant
from dreamquant.cli.arguments import (
    Channels,
    Device,
    Force,
    Json,
    Layout,
    Mean,
    Model,
    Outputs,
    Pixels,
    Quiet,
    Resize,
    Seed,
    Shape,
    Std,
    Trust,
    check_tool,
    check_whole_batches,
    input_options,
    method_options,
    recipe_settings,
)
from dreamquant.devices import AUTO
from dreamquant.flow import run, telling
from dreamquant.methods import find_method
from dreamquant.network.load import load
from dreamquant.quantization.plan import target_names
from dreamquant.report import check_report, write_report
from dreamquant.storage import FORMATS, check_pixels, check_samples_path, write_samples
from dreamquant.terminal import announce, console, print_json, print_result, progress_bars


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write: .onnx")],
    recipe: Annotated[str, typer.Option(help="a recipe's name (see `recipes`) or a .toml file")] = "auto",
    bits: Annotated[str | None, typer.Option(help="bits of weights and activations: W8A8, W4A4, ...")] = None,
    plan: Annotated[str | None, typer.Option(help="what is quantized: deploy, zeroq, brecq or a .toml file")] = None,
    target: Annotated[
        str | None,
        typer.Option(help=f"what the file is for, whose rules it keeps (docs/targets.md): {', '.join(target_names())}"),
    ] = None,
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    force: Force = False,
    trust_model: Trust = False,
    outputs: Outputs = None,
    images: Annotated[
        Path | None, typer.Option(help="images that may be used, a folder, .zip or .npz: calibrate on them, some are held out")
    ] = None,
    mix: Annotated[bool, typer.Option("--mix", help="calibrate on synthetic images too, beside those of --images")] = False,
    resize: Resize = "cover",
    budget: Annotated[str, typer.Option(help="quick, standard or paper")] = "standard",
    keep_float: Annotated[list[str] | None, typer.Option(help="a layer to leave in float (names: `inspect`)")] = None,
    bits_for: Annotated[
        list[str] | None, typer.Option(help="a layer with bits of its own: NAME=8 for weights and input, or NAME=W4A8")
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(help="percent: raise the worst layers until so many answers (top-1, ...) are the float network's"),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="stage.option=value, e.g. synthesis.steps=200")] = None,
    seed: Seed = 0,
    device: Device = AUTO,
    report: Annotated[Path | None, typer.Option(help="an .html file to write: what came of it, as one page to decide by")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="keep samples and result there; a run that was stopped goes on")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="tell the loss of accuracy from the answers on more images")
    ] = True,
    fastest: Annotated[
        bool,
        typer.Option("--fastest", help="where the file is no faster than float: leave in float what is faster so, by timing"),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL without data and prove the file that is written."""
    if report is not None:
        check_report(report, model=model, output=output)
    chosen = recipe_settings(settings or [], keep_float=keep_float or [], bits_for=bits_for or [], agreement=agreement)
    with progress_bars(quiet or as_json) as progress:
        result = run(
            model,
            output,
            recipe=recipe,
            bits=bits,
            plan=plan,
            target=target,
            budget=budget,
            settings=chosen,
            **input_options(input_shape, mean, std, pixels, layout, channels, outputs),
            force=force,
            trust=trust_model,
            device=device,
            images=images,
            mix=mix,
            resize=resize,
            seed=seed,
            run_dir=run_dir,
            estimate=estimate,
            fastest=fastest,
            progress=progress,
            announce=None if quiet or as_json else announce,
        )
        if report is not None:
            write_report(result, report, command=["dreamquant", *sys.argv[1:]], progress=progress)
    if as_json:
        print_json(result.summary())
    else:
        print_result(result, report)


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
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    force: Force = False,
    trust_model: Trust = False,
    outputs: Outputs = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="an option of the method: name=value")] = None,
    seed: Seed = 0,
    device: Device = AUTO,
    tool: Annotated[
        str | None, typer.Option("--for", help="modelopt: an .npz of the images alone, under the name of the model's input")
    ] = None,
    input_name: Annotated[str | None, typer.Option(help="that name, where MODEL is no .onnx file to take it from")] = None,
    quiet: Quiet = False,
) -> None:
    """Let MODEL dream images and write them."""
    check_tool(tool, input_name, model)
    named = bool(tool or input_name)
    check_samples_path(output, inputs=[Path(model)] if Path(model).is_file() else [], named=named)
    options = find_method("synthesis", method).check_options(method_options(settings or []))
    given = input_options(input_shape, mean, std, pixels, layout, channels, outputs)
    network = load(model, **given, force=force, trust=trust_model, device=device)
    if not output.suffix:
        check_pixels(network)
    if named:
        check_whole_batches(network, count)
    with progress_bars(quiet) as progress:
        samples = dreamquant.synthesize(
            network,
            count,
            method=method,
            seed=seed,
            budget=budget,
            callback=telling(progress, "dreaming images"),
            **options,
        )
    write_samples(samples, network, output, input_name=(input_name or network.input_name) if named else "")
    console(stderr=True).print(f"{len(samples)} images by {method} -> {output}")
