"""W8A8 for an integer runtime with no data, on the models of the data folder: accuracy, size, latency, what runs in int8.

    python benchmarks/deploy.py DATA [--recipe auto] [--seed 0] [--only NAME ...] [--set stage.option=value ...]

One JSON row a model on standard output. Top-1 is of the files in ONNX Runtime, on the labelled images of DATA.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

import dreamquant
from dreamquant.assess.assess import float_file
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import load_labelled
from dreamquant.runtime import onnx_runner

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR, NIPS, VAL = "cifar10/cifar10_test.npz", "imagenet/nips2017", "imagenet/val10x50"
MODELS = {  # name: (file, labelled images, column of the labels)
    "resnet20_bnfolded.onnx": ("cifar10/resnet20_bnfolded.onnx", CIFAR, ""),
    "resnet20.pt2": ("cifar10/resnet20.pt2", CIFAR, ""),
    "resnet56.pt2": ("cifar10/resnet56.pt2", CIFAR, ""),
    "mobilenetv1_025_bnfolded.onnx": ("imagenet/mobilenetv1_025_bnfolded.onnx", NIPS, "label"),
    "mobilenetv1_025.pt2": ("imagenet/mobilenetv1_025.pt2", NIPS, "label"),
    "squeezenet1_1.onnx": ("imagenet/squeezenet1_1.onnx", NIPS, "label"),
    "mobilenetv2_imagenette.onnx": ("imagenet/mobilenetv2_imagenette.onnx", VAL, "label10"),
    "yolox_nano.onnx": ("coco/yolox_nano.onnx", "", ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--bits", default=None)
    parser.add_argument("--plan", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--set", nargs="+", default=[], dest="settings")
    given = parser.parse_args()
    for name in given.only:
        print(json.dumps(measure(given.data, name, given)), flush=True)


def measure(data: Path, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Quantize one model and measure it."""
    file, images, column = MODELS[name]
    detector = not images
    mean, std = ((0.0,) * 3, (1 / 255,) * 3) if detector else (MEAN, STD)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized.onnx"
        result = dreamquant.run(
            data / file,
            output,
            recipe=given.recipe,
            bits=given.bits,
            plan=given.plan,
            seed=given.seed,
            mean=mean,
            std=std,
            settings=given.settings,
        )
        row = {"model": name, **result.summary(), "integer_operators": integer_operators(output)}
        row.pop("file")
        network = dreamquant.load(data / file, mean=mean, std=std)
        reference = float_file(network, Path(folder))
        if detector:
            return row | compare_detector(reference, output, data)
        labels = (data / f"{images}_labels.csv") if column else None
        labelled = load_labelled(data / (f"{images}.zip" if column else images), labels=labels, label_column=column or "label")
        for key, path in (("float_top1", reference), ("top1", output)):
            found = evaluate(
                onnx_runner(path, threads=1), labelled, input_shape=network.input_shape, mean=MEAN, std=STD, batch=50
            )
            row[key] = found.top1
        return row | {"images": len(labelled)}


def integer_operators(path: Path) -> dict[str, int]:
    """Convolutions and products as ONNX Runtime really runs them, after its own optimisation."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    wanted = (
        "QLinearConv",
        "Conv",
        "FusedConv",
        "QGemm",
        "Gemm",
        "QLinearMatMul",
        "MatMul",
        "QLinearAdd",
        "Add",
        "QLinearLeakyRelu",
    )
    return {name: counts[name] for name in wanted if counts[name]}


def compare_detector(reference: Path, output: Path, data: Path) -> dict[str, Any]:
    """Worst and mean relative error of a detector's output on photographs, letterboxed as it expects them (BGR, 0..255)."""
    import numpy as np
    from PIL import Image

    runners = onnx_runner(reference, threads=1), onnx_runner(output, threads=1)
    errors = []
    for path in sorted((data / "coco/images").glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = min(416 / image.width, 416 / image.height)
        small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        canvas = np.full((416, 416, 3), 114, np.float32)
        canvas[: small.height, : small.width] = np.asarray(small)[:, :, ::-1]
        batch = np.ascontiguousarray(canvas.transpose(2, 0, 1)[None])
        expected, actual = (torch.from_numpy(runner(batch)) for runner in runners)
        errors.append((torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item())
    return {
        "worst_relative_error": max(errors),
        "mean_relative_error": sum(errors) / len(errors),
        "images": len(errors),
    }


if __name__ == "__main__":
    main()
