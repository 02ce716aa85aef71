"""ZeroQ's distilled data under the `zeroq` protocol on CIFAR-10 ResNet-20: top-1 by bits and seed, and seconds of synthesis.

    python benchmarks/cifar_zeroq.py DATA [--seeds 3] [--steps 500] [--count 64]

DATA holds cifar10/resnet20.pt2 and cifar10/cifar10_test.npz. Top-1 is that of the exported file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import dreamquant
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import load_labelled
from dreamquant.flow import versions
from dreamquant.runtime import onnx_runner

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W6A6", "W4A4"])
    parser.add_argument("--method", default="zeroq")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network = dreamquant.load(given.data / "cifar10/resnet20.pt2", mean=MEAN, std=STD)
    labelled = load_labelled(given.data / "cifar10/cifar10_test.npz")
    for seed in range(given.seeds):
        wall, processor = time.perf_counter(), time.process_time()
        options = {} if given.method == "noise" else {"steps": given.steps}
        samples = dreamquant.synthesize(network, given.count, method=given.method, seed=seed, **options)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        for bits in given.bits:
            student = dreamquant.quantize(network, samples, bits=bits, plan="zeroq")
            with tempfile.TemporaryDirectory() as folder:
                artifact = dreamquant.export(student, Path(folder) / "student.onnx", samples)
                found = evaluate(
                    onnx_runner(artifact.path), labelled, input_shape=network.input_shape, mean=MEAN, std=STD, batch=128
                )
            row = {
                "model": "resnet20",
                "protocol": "zeroq",
                "method": given.method,
                "count": given.count,
                "steps": given.steps,
                "bits": bits,
                "seed": seed,
                "top1": found.top1,
                "images": found.images,
                "loss": samples.losses[-1] if samples.losses else None,
                "synthesis_seconds": wall,
                "synthesis_processor_seconds": processor,
                "file_agreement": artifact.verification.top1_agreement,
                "threads": given.threads,
                "versions": versions(),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
