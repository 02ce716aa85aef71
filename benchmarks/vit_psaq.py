"""Top-1 of a quantized vision transformer by where its calibration images come from, and why.

    python benchmarks/vit_psaq.py DATA runs/vit/vit.pt2 [--seeds 3] [--methods noise fractal rsd psaq real]

VIT.pt2 is what train_vit.py leaves. "real" are training images, for reference alone. Top-1 is that of the exported file in ONNX
Runtime on the CIFAR-10 test images. Each row also says how unlike the patches behind each attention are, and how wide the
activation ranges came out beside those of 64 real images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dreamquant
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import load_labelled
from dreamquant.flow import versions
from dreamquant.methods import find_method
from dreamquant.network.attention import probe_attention
from dreamquant.network.graph import Network
from dreamquant.quantization.student import Student
from dreamquant.runtime import onnx_runner
from dreamquant.synthesis.psaq import patch_entropy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W6A6", "W4A8"])
    parser.add_argument("--methods", nargs="+", default=["noise", "fractal", "rsd", "psaq", "real"])
    parser.add_argument("--set", nargs="+", default=[], dest="settings", help="options of the methods: name=value")
    parser.add_argument("--plan", default="deploy")
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = dreamquant.load(given.model, mean=MEAN, std=STD)
    labelled = load_labelled(given.data / "cifar10/cifar10_test.npz")
    reference = photographs(given.data, network, 64, seed=0)
    wide = {bits: widths(dreamquant.quantize(network, reference, bits=bits, plan=given.plan)) for bits in given.bits}
    base = {"model": given.model.stem, "protocol": given.plan, "float_top1": float_top1(given.model), "threads": 1}
    for seed in given.seeds:
        for method in given.methods:
            wall, processor = time.perf_counter(), time.process_time()
            options = dict(setting.split("=") for setting in given.settings)
            if method != "real" and "steps" in find_method("synthesis", method).options:
                options["steps"] = given.steps
            if method == "real":
                samples = photographs(given.data, network, given.count, seed)
            else:
                samples = dreamquant.synthesize(network, given.count, method=method, seed=seed, **options)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            made = {
                "method": method,
                "count": given.count,
                "options": options,
                "seed": seed,
                "loss": samples.losses[-1] if samples.losses else None,
                "synthesis_seconds": wall,
                "synthesis_processor_seconds": processor,
                "patch_entropy": entropies(network, samples.images),
                "confidence": network(samples.images).softmax(1).amax(1).mean().item(),
            }
            for bits in given.bits:
                student = dreamquant.quantize(network, samples, bits=bits, plan=given.plan)
                with tempfile.TemporaryDirectory() as folder:
                    artifact = dreamquant.export(student, Path(folder) / "student.onnx", samples)
                    found = evaluate(
                        onnx_runner(artifact.path, threads=1),
                        labelled,
                        input_shape=network.input_shape,
                        mean=MEAN,
                        std=STD,
                        batch=100,
                    )
                ratios = widths(student) / wide[bits]
                row = {
                    "bits": bits,
                    "top1": found.top1,
                    "images": found.images,
                    "file_agreement": artifact.verification.top1_agreement,
                    "ranges_beside_real": [
                        round(value, 3) for value in ratios.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
                    ],
                    "versions": versions(),
                }
                print(json.dumps(base | made | row), flush=True)


def photographs(data: Path, network: Network, count: int, seed: int) -> dreamquant.Samples:
    """`count` training images, in the input space."""
    with np.load(data / "cifar10/cifar10_train20k.npz") as file:
        chosen = np.sort(np.random.default_rng(seed).choice(len(file["y"]), count, replace=False))
        pixels = torch.from_numpy(file["x"][chosen]).permute(0, 3, 1, 2).float() / 255
    images = (pixels - torch.tensor(network.mean).view(-1, 1, 1)) / torch.tensor(network.std).view(-1, 1, 1)
    return dreamquant.Samples(images.contiguous(), method="real", seed=seed)


def float_top1(model: Path) -> float:
    """What train_vit.py measured."""
    found: float = json.loads(model.with_suffix(".json").read_text())["top1"]
    return found


@torch.no_grad()
def entropies(network: Network, images: Tensor) -> list[float]:
    """Mean differential entropy of patch similarity behind each attention."""
    return [round(patch_entropy(patches).mean().item(), 3) for patches in probe_attention(network)(images)[1]]


def widths(student: Student) -> Tensor:
    """The width of every activation's range."""
    grids = [tensor.grid for tensor in student.tensors() if tensor.kind == "activation"]
    return torch.stack([grid.scale.flatten()[0] * (grid.qmax - grid.qmin) for grid in grids])


if __name__ == "__main__":
    main()
