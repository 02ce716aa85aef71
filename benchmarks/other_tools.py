"""Other tools' quantizers, fed with noise, with dreamt images and with photographs: top-1 of their int8 files.

    python benchmarks/other_tools.py DATA [--model squeezenet mobilenetv2 mobilenetv1] [--seed 0] [--keep FOLDER]

ONNX Runtime's `quantize_static` (QDQ, uint8 activations, int8 weights per channel, min-max, after its `quant_pre_process`) and
NNCF's `nncf.quantize` (defaults), each with the same 64 images; `reduce_range`, weights of 7 bits, is what ONNX Runtime advises
for processors without VNNI, whose int8 kernels saturate. Photographs are of the set that is not evaluated: val10x50 for
what is measured on nips2017, and the other way round. One JSON row a file is appended to benchmarks/results/other_tools.jsonl;
`--keep` keeps dreamt images that take long, and uses those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import dreamquant  # isort: skip  # before torch
import onnx
import onnx.version_converter
import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.flow import versions
from dreamquant.runtime import onnx_runner
from dreamquant.storage import load_samples, save_samples

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT, PER_CHANNEL_OPSET = 64, 13
RESULTS = Path(__file__).parent / "results" / "other_tools.jsonl"
NIPS, VAL = "nips2017", "val10x50"
MODELS = {  # name: (file, images it is evaluated on, column of their labels, images whose photographs calibrate it)
    "squeezenet": ("squeezenet1_1.onnx", NIPS, "label", VAL),
    "mobilenetv2": ("mobilenetv2_imagenette.onnx", VAL, "label10", NIPS),
    "mobilenetv1": ("mobilenetv1_025_bnfolded.onnx", NIPS, "label", VAL),
}
CALIBRATIONS = ("normal noise", "uniform noise", "fractal", "rsd", "photographs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", nargs="+", default=["squeezenet", "mobilenetv2"], choices=list(MODELS))
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--calibration", nargs="+", default=list(CALIBRATIONS), choices=list(CALIBRATIONS))
    parser.add_argument("--steps", type=int, default=200, help="of rsd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.model:
        measure(model, given)


def measure(model: str, given: argparse.Namespace) -> None:
    """Every tool with every kind of images, one row each."""
    file, evaluated, column, other = MODELS[model]
    folder = given.data / "imagenet"
    network = dreamquant.load(folder / file, mean=MEAN, std=STD)
    labelled = load(folder, evaluated, column)
    float_top1 = top1(folder / file, labelled, network)
    for calibration in given.calibration:
        samples = images(calibration, model, network, load(folder, other, "label"), given)
        for tool in given.tool:
            with tempfile.TemporaryDirectory() as place:
                output = Path(place) / "int8.onnx"
                began = time.process_time()
                TOOLS[tool](folder / file, output, samples, network.input_name)
                seconds = time.process_time() - began
                row = {
                    "model": model,
                    "tool": tool,
                    "calibration": calibration
                    + {"photographs": f" of {other}", "rsd": f" {given.steps} steps"}.get(calibration, ""),
                    "count": len(samples),
                    "seed": given.seed,
                    "top1": top1(output, labelled, network),
                    "images": len(labelled),
                    "evaluated": evaluated,
                    "float_top1": float_top1,
                    "bytes": output.stat().st_size,
                    "quantization_processor_seconds": seconds,
                    "versions": versions() | {"nncf": version("nncf")},
                }
            print(json.dumps(row), flush=True)
            with RESULTS.open("a") as results:
                results.write(json.dumps(row) + "\n")


def load(folder: Path, name: str, column: str) -> LabelledImages:
    return load_labelled(folder / f"{name}.zip", labels=folder / f"{name}_labels.csv", label_column=column)


def top1(path: Path, labelled: LabelledImages, network: dreamquant.Network) -> float:
    runner = onnx_runner(path, threads=1)
    return evaluate(runner, labelled, input_shape=network.input_shape, mean=MEAN, std=STD, batch=50).top1


def images(
    calibration: str, model: str, network: dreamquant.Network, photographs: LabelledImages, given: argparse.Namespace
) -> dreamquant.Samples:
    """The images that calibrate, in the network's input space."""
    generator = torch.Generator().manual_seed(given.seed)
    shape = (COUNT, *network.input_shape)
    if calibration == "normal noise":
        return dreamquant.Samples(torch.randn(shape, generator=generator), seed=given.seed)
    if calibration == "uniform noise":
        return dreamquant.Samples(torch.rand(shape, generator=generator), seed=given.seed)
    if calibration == "photographs":
        batches = photographs.spread(COUNT).batches(COUNT, input_shape=network.input_shape, mean=MEAN, std=STD)
        return dreamquant.Samples(torch.from_numpy(next(batches)[0]))
    if calibration == "fractal":
        return dreamquant.synthesize(network, COUNT, method="fractal", seed=given.seed)
    return dreamt(model, network, given)


def dreamt(model: str, network: dreamquant.Network, given: argparse.Namespace) -> dreamquant.Samples:
    """Images by `rsd`, those of an earlier run if there are any."""
    made_by = {"method": "rsd", "model": model, "count": COUNT, "seed": given.seed, "options": {"steps": given.steps}}
    path = None if given.keep is None else given.keep / f"{model}.rsd.{given.seed}.safetensors"
    kept = None if path is None or not path.exists() else load_samples(path, made_by)
    if kept is not None:
        return kept
    samples = dreamquant.synthesize(network, COUNT, method="rsd", seed=given.seed, steps=given.steps)
    if path is not None:
        save_samples(samples, path, made_by)
    return samples


def prepared_for_tools(model: Path, output: Path, sizes: tuple[int, ...]) -> Path:
    """The file as other tools ask for it, written to `output` where it is not so: of an opset that has a grid for each channel of
    a tensor, and, where it leaves the size of its images open, with images of `sizes` (N, ...), as shape inference needs it."""
    given = onnx.load(model)
    dimensions = given.graph.input[0].type.tensor_type.shape.dim
    is_open = any(not one.dim_value for one in dimensions[1:])
    old = next(opset.version for opset in given.opset_import if opset.domain in ("", "ai.onnx")) < PER_CHANNEL_OPSET
    if is_open:
        for dimension, size in zip(dimensions, sizes, strict=True):
            dimension.Clear()
            dimension.dim_value = size
        del given.graph.value_info[:]
    if not is_open and not old:
        return model
    onnx.save(onnx.version_converter.convert_version(given, PER_CHANNEL_OPSET) if old else given, output)
    return output


def onnxruntime_static(
    model: Path,
    output: Path,
    samples: dreamquant.Samples,
    input_name: str,
    *,
    ranges: CalibrationMethod = CalibrationMethod.MinMax,
    reduce_range: bool = False,
) -> None:
    """ONNX Runtime's quantizer, as its documentation runs it; `prepared.onnx` is left beside `output`."""
    prepared = output.with_name("prepared.onnx")
    try:
        quant_pre_process(str(model), str(prepared))
    except Exception:  # of symbolic shapes, which the documentation then leaves out
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(output),
        dreamquant.CalibrationReader(samples, input_name),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
        calibrate_method=ranges,
    )


def nncf_quantize(model: Path, output: Path, samples: dreamquant.Samples, input_name: str) -> None:
    """NNCF's quantizer with its defaults."""
    os.environ.setdefault("NNCF_CI", "1")  # read when nncf is imported: it then reports nothing to its makers
    import nncf

    quantized = nncf.quantize(onnx.load(model), dreamquant.nncf_dataset(samples, input_name), subset_size=len(samples))
    onnx.save(quantized, output)


TOOLS: dict[str, Callable[[Path, Path, dreamquant.Samples, str], None]] = {
    "onnxruntime quantize_static": onnxruntime_static,
    "onnxruntime quantize_static, reduce_range": partial(onnxruntime_static, reduce_range=True),
    "nncf.quantize": nncf_quantize,
}


if __name__ == "__main__":
    main()
