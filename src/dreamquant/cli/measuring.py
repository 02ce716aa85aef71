"""The commands that measure files and images: `evaluate`, `dreams` and `compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from dreamquant.assess.compare import COUNT
from dreamquant.assess.compare import compare as compare_files
from dreamquant.assess.dreams import measure
from dreamquant.assess.evaluate import asks_for_accuracy, check_normalised, judge, runnable
from dreamquant.assess.evaluate import evaluate as evaluate_run
from dreamquant.assess.labelled import load_labelled
from dreamquant.cli.arguments import (
    Blank,
    Channels,
    Force,
    Json,
    LabelColumn,
    Labels,
    Layout,
    Mean,
    Model,
    Outputs,
    Pixels,
    Quiet,
    Resize,
    Shape,
    Std,
    Trust,
    input_options,
    load_images,
)
from dreamquant.devices import CPU
from dreamquant.flow import telling
from dreamquant.network.load import load
from dreamquant.quantization.plan import load_plan
from dreamquant.storage import read_samples
from dreamquant.terminal import print_comparison, print_dreams, print_evaluation, print_json, print_judgement, progress_bars


def evaluate(
    model: Model,
    data: Annotated[
        Path, typer.Argument(help="a folder with one sub-folder a class, a folder or .zip with --labels, or an .npz")
    ],
    labels: Labels = None,
    label_column: LabelColumn = "label",
    resize: Resize = "cover",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    force: Force = False,
    trust_model: Trust = False,
    outputs: Outputs = None,
    blank: Blank = None,
    batch: Annotated[int, typer.Option(help="images at once")] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What MODEL is worth on labelled images, as its outputs' kind has it: accuracy, F1, mean IoU, mAP, neighbours, lines read,
    errors. An ONNX file, quantized or not, is run in ONNX Runtime as it is."""
    images = load_labelled(data, labels=labels, label_column=label_column, resize=resize)
    options = input_options(input_shape, mean, std, pixels, layout, channels, outputs)
    subject = runnable(model, **options, force=force, trust=trust_model)
    if blank is not None or not asks_for_accuracy(subject, images):
        with progress_bars(quiet or as_json) as progress:
            judged = judge(subject, images, blank=blank, batch=batch, callback=telling(progress, "evaluating"))
        if as_json:
            print_json(asdict(judged), indent=None)
        else:
            print_judgement(judged)
        return
    with progress_bars(quiet or as_json) as progress:
        found = evaluate_run(
            subject.run,
            images,
            input_shape=subject.input_shape,
            mean=subject.mean,
            std=subject.std,
            channels=subject.channels,
            batch=batch,
            callback=telling(progress, "evaluating"),
        )
    if as_json:
        values = {"top1": found.top1, "top5": found.top5, "images": found.images, "seconds": found.seconds}
        print_json(values, indent=None)
    else:
        print_evaluation(found)


def dreams(
    model: Model,
    samples: Annotated[Path, typer.Argument(help="a .safetensors or .npz file that `synthesize` wrote")],
    data: Annotated[Path | None, typer.Option(help="real images to compare ranges with, as `evaluate` takes them")] = None,
    labels: Labels = None,
    label_column: LabelColumn = "label",
    resize: Resize = "cover",
    plan: Annotated[str, typer.Option(help="the plan whose tensors are compared")] = "zeroq",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    force: Force = False,
    trust_model: Trust = False,
    outputs: Outputs = None,
    as_json: Json = False,
) -> None:
    """Measure the images in SAMPLES: distance to MODEL's BatchNorms, diversity, classes and, against real images, ranges."""
    chosen, dreamt = load_plan(plan), read_samples(samples)
    images = load_images(data, labels, label_column, resize)
    given = input_options(input_shape, mean, std, pixels, layout, channels, outputs)
    network = load(model, **given, force=force, trust=trust_model, device=CPU)
    real = None
    if images is not None:
        check_normalised(model, network.mean, network.std)
        few = images.spread(len(dreamt))
        batches = few.batches(
            len(few), input_shape=network.input_shape, mean=network.mean, std=network.std, channels=network.space.channels
        )
        real = torch.from_numpy(next(batches)[0])
    found = measure(network, dreamt, real=real, plan=chosen)
    if as_json:
        print_json(asdict(found))
    else:
        print_dreams(found)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.onnx", help="an ONNX file of any tool, the one that B is measured against")],
    b: Annotated[Path, typer.Argument(metavar="B.onnx", help="another, for the same images")],
    samples: Annotated[
        Path | None, typer.Option(help="compare outputs on these: a .safetensors or .npz file that `synthesize` wrote")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="or on real images, as `evaluate` takes them; labels, where there are any, tell what A and B are worth"
        ),
    ] = None,
    labels: Labels = None,
    label_column: LabelColumn = "label",
    resize: Resize = "cover",
    input_shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    pixels: Pixels = None,
    layout: Layout = None,
    channels: Channels = None,
    outputs: Outputs = None,
    blank: Blank = None,
    count: Annotated[int, typer.Option("--count", "-n", help="procedural images, where neither is given")] = COUNT,
    batch: Annotated[int | None, typer.Option(help="images at once when timed; without it 1, or what the files take")] = None,
    threads: Annotated[int, typer.Option(help="threads inside one operator")] = 1,
    rounds: Annotated[int, typer.Option(help="how often each file is timed, in turns")] = 20,
    seed: Annotated[int, typer.Option(help="of procedural images")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two ONNX files in ONNX Runtime: size, layers, latency, every output and, by labels, what they are worth."""
    images = load_images(data, labels, label_column, resize, required=False)
    with progress_bars(quiet or as_json) as progress:
        found = compare_files(
            a,
            b,
            samples=None if samples is None else read_samples(samples),
            data=images,
            **input_options(input_shape, mean, std, pixels, layout, channels, outputs),
            blank=blank,
            count=count,
            batch=batch,
            threads=threads,
            rounds=rounds,
            seed=seed,
            callback=telling(progress, "comparing"),
        )
    if as_json:
        print_json(asdict(found))
    else:
        print_comparison(found)
