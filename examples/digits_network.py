"""A small residual network for handwritten digits: `network()` is what the file shipped beside it was trained to be."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

INPUT_SHAPE = (1, 16, 16)
MEAN = (0.3054,)  # of the training images, pixels in 0..1
STD = (0.3187,)
WEIGHTS = Path(__file__).parent / "digits" / "digits.safetensors"


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """(N, 1, 16, 16), normalised by MEAN and STD -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 48, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        logits: Tensor = self.fc(torch.flatten(self.pool(self.stages(x)), 1))
        return logits


def network() -> nn.Module:
    """The trained network, in eval mode."""
    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
