"""A small vision transformer for CIFAR-10, so that there is one to quantize: trained here, from its seed, on one core.

    nice -n 15 python benchmarks/train_vit.py DATA --output runs/vit [--epochs 16] [--seed 0]

DATA holds cifar10/cifar10_train20k.npz (20,000 images) and cifar10/cifar10_test.npz. Writes vit.pt2 (torch.export, any batch)
and vit.json (accuracy on the test images, settings, seconds). The same seed and threads give the same weights on one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.flow import versions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10


class Block(nn.Module):
    """Pre-norm attention and perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.project(mixed)
        result: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return result


class VisionTransformer(nn.Module):
    """64 patches of 4x4 pixels, learnt positions, mean over patches; two strided convolutions make the patches."""

    def __init__(self, width: int = 96, depth: int = 5, heads: int = 3, ratio: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width // 2, 3, stride=2, padding=1)
        self.patches = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(F.gelu(self.stem(x))).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x + self.position)).mean(1)
        scores: Tensor = self.head(x)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/vit"))
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many, to see how long they take")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    began = time.process_time()
    network = VisionTransformer()
    train(network, *load(given.data / "cifar10/cifar10_train20k.npz"), given)
    accuracy = top1(network, *load(given.data / "cifar10/cifar10_test.npz"))
    given.output.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 3, 32, 32)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, given.output / "vit.pt2")
    found = {
        "top1": accuracy,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "epochs": given.epochs,
        "batch": given.batch,
        "learning_rate": given.learning_rate,
        "seed": given.seed,
        "processor_seconds": time.process_time() - began,
        "mean": MEAN,
        "std": STD,
        "versions": versions(),
    }
    (given.output / "vit.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found), flush=True)


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,)."""
    with np.load(path) as file:
        pixels, labels = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return ((images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)).contiguous(), labels


def train(network: nn.Module, images: Tensor, labels: Tensor, given: argparse.Namespace) -> None:
    """AdamW, a warm-up of one epoch and a cosine to nothing, smoothed labels, mirrored and shifted images."""
    decayed = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.learning_rate)
    each = len(images) // given.batch
    total = given.epochs * each
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / each, 0.5 + 0.5 * math.cos(math.pi * step / total))
    )
    generator = torch.Generator().manual_seed(given.seed)
    step, began = 0, time.perf_counter()
    for epoch in range(given.epochs):
        sums = 0.0
        for chosen in torch.randperm(len(images), generator=generator)[: each * given.batch].split(given.batch):
            scores = network(augment(images[chosen], generator))
            loss = F.cross_entropy(scores, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step, sums = step + 1, sums + loss.item()
            if step == given.steps:
                print(f"{step} steps, {time.perf_counter() - began:.1f} s, loss {loss.item():.3f}", flush=True)
                return
        print(f"epoch {epoch + 1}: loss {sums / each:.3f}, {time.perf_counter() - began:.0f} s", flush=True)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored one time in two, and shifted by up to four pixels over black."""
    n, channels, height, width = images.shape
    mirrored = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
    images = F.pad(torch.where(mirrored, images.flip(3), images), (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 9, (n, 1), generator=generator) for _ in range(2))
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    index = (rows.unsqueeze(2) * (width + 8) + columns.unsqueeze(1)).flatten(1)
    shifted = images.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1))
    return shifted.reshape(n, channels, height, width)


@torch.no_grad()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images whose highest score is their label's."""
    chosen = torch.cat([network(part).argmax(1) for part in images.split(200)])
    right = int((chosen == labels).sum())
    return 100 * right / len(images)


if __name__ == "__main__":
    main()
