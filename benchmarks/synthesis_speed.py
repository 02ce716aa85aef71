"""What a step of each dreamer costs, one thread: processor milliseconds for one image and step, after a step to warm up.

    python benchmarks/synthesis_speed.py DATA [--models resnet20 mobilenetv1 mobilenetv2] [--methods zeroq dsg ...]

DATA holds the folders cifar10 and imagenet. Rows go to results/synthesis_speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch

import dreamquant
from dreamquant.methods import find_method, method_names
from dreamquant.run import versions
from dreamquant.synthesis import lacking

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = {
    "resnet20": ("cifar10/resnet20.pt2", 64),
    "mobilenetv1": ("imagenet/mobilenetv1_025.pt2", 16),
    "mobilenetv2": ("imagenet/mobilenetv2_imagenette.pt2", 8),
}
RESULTS = Path(__file__).parent / "results" / "synthesis_speed.jsonl"
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=method_names("synthesis"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.models:
        path, count = MODELS[model]
        network = dreamquant.load(given.data / path, mean=MEAN, std=STD)
        for name in given.methods or method_names("synthesis"):
            method = find_method("synthesis", name)
            if "steps" not in method.options or lacking(method, network):
                continue
            ended: list[float] = []
            options = {"steps": STEPS + 1} | ({"batch": count} if "batch" in method.options else {})
            dreamquant.synthesize(
                network, count, method=name, callback=lambda *_, ended=ended: ended.append(time.process_time()), **options
            )
            fastest = min(after - before for before, after in pairwise(ended))
            row = {
                "model": model,
                "method": name,
                "images": count,
                "threads": 1,
                "ms_per_image": round(1000 * fastest / count, 3),
            }
            print(model, name, row["ms_per_image"], flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | versions()) + "\n")


if __name__ == "__main__":
    main()
