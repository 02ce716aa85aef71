"""Train the network of `digits_network.py` on scikit-learn's handwritten digits and write the files in `digits/`.

The 1,797 images of `sklearn.datasets.load_digits` (8x8, 17 grey levels) are doubled in size; 1,200 train the network,
the other 597 are held out. Nothing is downloaded. Half a minute on one processor core; the same versions of the
libraries on the same processor give the same files again. Needs the development dependencies.

The images are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, licensed CC BY 4.0.

    python examples/train_digits.py
"""

import io
import time
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from digits_network import INPUT_SHAPE, MEAN, STD, Block, DigitsNet
from dreamquant.assess.evaluate import evaluate, onnx_runner
from dreamquant.assess.labelled import load_labelled
from dreamquant.files import atomic_write

SEED = 0
HELD_OUT = 597
EPOCHS = 20
BATCH = 64
LEARNING_RATE = 0.003
FOLDER = Path(__file__).parent / "digits"
METADATA = {
    "dreamquant.mean": ",".join(map(str, MEAN)),
    "dreamquant.std": ",".join(map(str, STD)),
}


def main() -> None:
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.use_deterministic_algorithms(True)
    train_x, test_x, train_y, test_y = digits()
    began = time.perf_counter()
    model = train(normalised(train_x), torch.from_numpy(train_y))
    print(f"trained on {len(train_x)} images in {time.perf_counter() - began:.0f} s")
    write(model, test_x, test_y)
    accuracy(model, test_x, test_y)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Training and held-out images, uint8 (n, 16, 16), and their classes."""
    data = load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    size = INPUT_SHAPE[:0:-1]
    images = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BILINEAR)) for x in small])
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=HELD_OUT, random_state=SEED, stratify=data.target
    )
    return train_x, test_x, train_y, test_y


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """(n, 16, 16) pixels as the network takes them, (n, 1, 16, 16)."""
    return (torch.from_numpy(images)[:, None].float() / 255 - MEAN[0]) / STD[0]


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """The network after `EPOCHS` rounds of Adam.

    Neither augmentation nor weight decay: both make a network milder to quantize than those that people bring.
    """
    torch.manual_seed(SEED)
    model = DigitsNet()
    order = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def write(model: DigitsNet, test_x: NDArray[np.uint8], test_y: NDArray[np.int64]) -> None:
    """The weights, the network as `.pt2` and as `.onnx` without BatchNorm, and the held-out images."""
    FOLDER.mkdir(exist_ok=True)
    held_out = io.BytesIO()
    np.savez_compressed(held_out, x=test_x, y=test_y.astype(np.uint8))
    atomic_write(FOLDER / "digits.safetensors", save(model.state_dict()))
    atomic_write(FOLDER / "digits.pt2", as_pt2(model))
    atomic_write(FOLDER / "digits_bnfolded.onnx", as_onnx(folded(model)))
    atomic_write(FOLDER / "digits_test.npz", held_out.getvalue())
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name:22} {path.stat().st_size:9,d} bytes")


def as_pt2(model: nn.Module) -> bytes:
    """The exported program, for any batch size, without traces of where it was made."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, *INPUT_SHAPE),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=METADATA)
    return file.getvalue()


def folded(model: DigitsNet) -> DigitsNet:
    """A copy with each BatchNorm folded into the convolution before it."""
    model = deepcopy(model)
    model.conv, model.bn = fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    for block in model.modules():
        if isinstance(block, Block):
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
            block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
            if isinstance(block.shortcut, nn.Sequential):
                block.shortcut = fuse_conv_bn_eval(block.shortcut[0], block.shortcut[1])
    return model


def as_onnx(model: nn.Module) -> bytes:
    """The network in opset 17, for any batch size, with its normalisation in the file's metadata."""
    file = io.BytesIO()
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    with warnings.catch_warnings():  # the exporter that can write opset 17 announces that there is a newer one
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, (torch.zeros(2, *INPUT_SHAPE),), file, opset_version=17, dynamo=False, **names)
    proto = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, METADATA)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def accuracy(model: nn.Module, test_x: NDArray[np.uint8], test_y: NDArray[np.int64]) -> None:
    """Held-out accuracy in torch, and of the ONNX file over the images as they were written."""
    with torch.no_grad():
        right = model(normalised(test_x)).argmax(dim=1).numpy() == test_y
    data = load_labelled(FOLDER / "digits_test.npz")
    runner = onnx_runner(FOLDER / "digits_bnfolded.onnx")
    result = evaluate(runner, data, input_shape=INPUT_SHAPE, mean=MEAN, std=STD)
    print(f"top-1 on {len(data)} held-out images: torch {100 * right.mean():.2f} %, ONNX file {result.top1:.2f} %")


if __name__ == "__main__":
    main()
