"""What a network is fed: stated, stored, built in, remembered by a BatchNorm, or not known and said so."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamquant.errors import ModelError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.input_evidence import bias_size, one_over_f, preprocessing, remembered
from dreamquant.network.input_space import KEY, MEAN_KEY, STD_KEY, InputSpace, Statement, of_pixels, of_properties, stated
from dreamquant.network.load import load
from dreamquant.synthesis import synthesize

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHAPE = (3, 24, 20)


def pictures(count: int, channels: int = 3, *, mean: float = 0.45, deviation: float = 0.2) -> Tensor:
    """Pixels 0..1 with 1/f texture of their own in each channel and brightnesses that differ."""
    generator = torch.Generator().manual_seed(5)
    texture = torch.stack([one_over_f(*SHAPE[1:], generator) for _ in range(count * channels)]).view(count, channels, *SHAPE[1:])
    bright = torch.randn((count, 1, 1, 1), generator=generator)
    return (mean + deviation * (0.8 * texture + 0.6 * bright)).clamp(0, 1)


class Inside(nn.Module):
    """A network behind preprocessing of its own."""

    def __init__(self, before: Callable[[Tensor], Tensor], net: nn.Module) -> None:
        super().__init__()
        self.before, self.net = before, net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(self.before(x))
        return result


def trained(fed: Tensor, *, norm: bool = True, seed: int = 0) -> nn.Module:
    """A convolution network whose BatchNorms, or folded biases, know the images `fed` (N, C, H, W)."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(fed.shape[1], 12, 3, 2, 1, bias=not norm),
        *([nn.BatchNorm2d(12, momentum=None)] if norm else []),
        nn.ReLU(),
    ]
    net = nn.Sequential(*layers, nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 5))
    with torch.no_grad():
        if norm:
            net.train()(fed)
        else:  # what folding a BatchNorm leaves: answers of deviation 1 around 0.3
            answers = net[0](fed) - net[0].bias.view(1, -1, 1, 1)
            deviation, mean = answers.std((0, 2, 3)), answers.mean((0, 2, 3))
            net[0].weight /= deviation.view(-1, 1, 1, 1)
            net[0].bias.copy_(0.3 - mean / deviation)
    return net.eval()


def fed_as(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    return (pixels - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


# ---- what is stated


def test_a_statement_becomes_mean_and_std_of_pixels_in_0_to_1() -> None:
    assert Statement(pixels="0..255").normalisation(2) == ((0.0, 0.0), (1 / 255, 1 / 255))
    assert Statement(pixels="-1..1").normalisation(1) == ((0.5,), (0.5,))
    mean, std = Statement((123.675,), (58.395,), pixels="0..255").normalisation(1)
    assert (mean, std) == (pytest.approx((0.485,)), pytest.approx((0.229,)))
    assert stated(Statement(), 3, "net") is None
    none = stated(Statement(pixels="none"), 3, "net")
    assert none is not None
    assert (none.mean, none.centre, none.spread) == ((), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "belong together"),
        ({"pixels": "0-1"}, r"unknown pixels '0-1'.*0\.\.255"),
        ({"layout": "nhwc!"}, "unknown layout"),
        ({"channels": "cmyk"}, "unknown channels"),
        ({"pixels": "none", "mean": (0.5,), "std": (0.5,)}, "no pixels that mean and std could normalise"),
        (
            {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
            r"--pixels 0\.\.255, or give mean 0\.485,0\.456,0\.406",
        ),
        ({"mean": (0.5,), "std": (127.5,)}, "1 at most"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "finite"),
        ({"mean": (0.5,), "std": (0.0,)}, "above 0"),
    ],
)
def test_statements_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Statement(**options)


# ---- what a file says


def test_a_space_comes_back_from_the_properties_it_is_written_to() -> None:
    space = replace(of_pixels(*IMAGENET), layout="NHWC", channels="bgr", dtype="uint8", doubt="none")
    again = of_properties(space.properties(), 3)

    assert again is not None
    assert again == replace(space, known="file", because=again.because)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", json.dumps({"mean": [1]}), json.dumps({"mean": "x"})])
def test_properties_that_are_not_whole_say_nothing(text: str) -> None:
    assert of_properties({KEY: text}, 3) is None
    assert of_properties({KEY: InputSpace((0.5,), (0.5,)).properties()[KEY]}, 3) is None


@pytest.mark.parametrize(("mean", "std"), [("0.5", "0"), ("0.5", "-1"), ("nan", "1"), ("0.5", "inf")])
def test_properties_that_cannot_be_are_refused(mean: str, std: str) -> None:
    with pytest.raises(ModelError, match="deviations above 0"):
        of_properties({MEAN_KEY: mean, STD_KEY: std}, 1)
    assert of_properties({KEY: InputSpace((0.5,), (float(std),)).properties()[KEY]}, 1) is None or std == "1"


def test_properties_of_other_exporters() -> None:
    ultralytics = of_properties({"author": "Ultralytics", "task": "detect"}, 3)
    onnx = of_properties({"Image.NominalPixelRange": "NominalRange_0_255", "Image.BitmapPixelFormat": "Bgr8"}, 3)

    assert ultralytics is not None
    assert (ultralytics.numbers(), ultralytics.channels, ultralytics.known) == ("pixels 0..1", "rgb", "file")
    assert onnx is not None
    assert (onnx.numbers(), onnx.channels) == ("pixels 0..255", "bgr")


# ---- what the graph does


@pytest.mark.parametrize(
    ("before", "pixels"),
    [
        (lambda x: x / 255, "0..255"),
        (lambda x: x / 127.5 - 1, "0..255"),
        (lambda x: (x - 128) * 0.0078125, "0..255"),
        (lambda x: x * 2 - 1, "0..1"),
        (lambda x: (x - torch.tensor(IMAGENET[0]).view(1, 3, 1, 1)) / torch.tensor(IMAGENET[1]).view(1, 3, 1, 1), "0..1"),
        (lambda x: (x / 255 - torch.tensor(IMAGENET[0]).view(1, 3, 1, 1)) / torch.tensor(IMAGENET[1]).view(1, 3, 1, 1), "0..255"),
        (lambda x: (x + 1) / 2, "-1..1"),
        (lambda x: x * 1.0, ""),  # tells nothing
        (lambda x: x * 1000.0, ""),
    ],
)
def test_preprocessing_inside_tells_the_pixels(before: Callable[[Tensor], Tensor], pixels: str) -> None:
    space = load(Inside(before, trained(pictures(16), norm=False)), input_shape=SHAPE).space

    assert (space.known, space.numbers() if space.mean else "") == (("graph", f"pixels {pixels}") if pixels else ("unknown", ""))


def test_preprocessing_is_read_channel_by_channel() -> None:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in IMAGENET)
    found = preprocessing(load(Inside(lambda x: (x - mean) / std, trained(pictures(4), norm=False)), input_shape=SHAPE))

    assert found is not None
    assert found.mean == pytest.approx([123.675, 116.28, 103.53], rel=1e-4)
    assert found.std == pytest.approx([58.395, 57.12, 57.375], rel=1e-4)


# ---- what a BatchNorm remembers

SPACES = [
    IMAGENET,
    ((0.5,) * 3, (0.5,) * 3),
    ((0.0,) * 3, (1.0,) * 3),
    ((0.0,) * 3, (1 / 255,) * 3),
    ((0.2, 0.5, 0.7), (0.5, 0.1, 0.3)),
]


@pytest.mark.parametrize(("mean", "std"), SPACES)
def test_the_first_batchnorm_remembers_mean_and_deviation_of_the_images(mean: Any, std: Any) -> None:
    images = fed_as(pictures(64), mean, std)
    found = remembered(load(trained(images), input_shape=SHAPE))

    assert found is not None
    assert found.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.05 * images.std().item())
    if len(set(std)) == 1:  # one deviation is found for all channels
        assert found.deviation == pytest.approx(images.std((0, 2, 3)).mean().item(), rel=0.2)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels(channels: int) -> None:
    images = 30 * pictures(64, channels) + 7
    network = load(trained(images), input_shape=(channels, *SHAPE[1:]))

    assert network.space.known == "measured"
    assert network.space.centre == pytest.approx(images.mean((0, 2, 3)).tolist(), rel=0.1)
    made = synthesize(network, 64, method="fractal").images
    assert made.mean((0, 2, 3)).tolist() == pytest.approx(list(network.space.centre), rel=0.1)


def test_a_batchnorm_on_the_image_itself() -> None:
    images = 255 * pictures(64, 1)
    net = nn.Sequential(nn.BatchNorm2d(1, momentum=None), nn.Conv2d(1, 4, 3), nn.Flatten(1))
    net.train()(images)
    space = load(net, input_shape=(1, *SHAPE[1:])).space

    assert (space.known, space.numbers()) == ("measured", "pixels 0..255")
    assert (*space.centre, *space.spread) == pytest.approx((images.mean().item(), images.std().item()), rel=0.05)


@pytest.fixture(scope="module", params=SPACES[:4])
def fed(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Tensor, nn.Module]]:
    """A space, images in it, and a network that knows them, which is captured once."""
    images = fed_as(pictures(64), *request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["dreamquant.network.load"], "capture", functools.cache(capture))
        yield request.param, images, trained(images)


@pytest.mark.parametrize(("wrong_mean", "wrong_std"), SPACES[:4])
def test_what_is_stated_is_confirmed_refused_or_made_harmless(
    fed: tuple[Any, Tensor, nn.Module], wrong_mean: Any, wrong_std: Any
) -> None:
    """Whatever is stated, images for calibration are as those of training, or there are none."""
    space_fed, images, net = fed
    network = load(net, input_shape=SHAPE, mean=wrong_mean, std=wrong_std, force=True)
    space = network.space
    if space.doubt:
        assert space_fed != (wrong_mean, wrong_std)
        assert space.ends() is None
        with pytest.raises(ModelError, match="contradicted by its first BatchNorm"):
            load(net, input_shape=SHAPE, mean=wrong_mean, std=wrong_std)
    assert space.centre == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.5 * images.std().item())
    assert space.spread[0] == pytest.approx(images.std().item(), rel=0.5)


def test_without_batchnorm_another_order_of_magnitude_is_refused() -> None:
    for right, wrong in ((SPACES[0], SPACES[3]), (SPACES[3], SPACES[0]), (SPACES[3], SPACES[2])):
        net = trained(fed_as(pictures(64), *right), norm=False)
        assert load(net, input_shape=SHAPE, mean=right[0], std=right[1]).space.known == "stated"
        with pytest.raises(ModelError, match="times its bias"):
            load(net, input_shape=SHAPE, mean=wrong[0], std=wrong[1])


def test_what_nothing_tells_is_an_error_that_says_what_to_state() -> None:
    network = load(trained(fed_as(pictures(64), *IMAGENET), norm=False), input_shape=SHAPE)

    assert network.space.known == "unknown"
    with pytest.raises(ModelError, match=r"--mean and --std.*--pixels.*numbers near 1, not as large as"):
        synthesize(network, 2, method="fractal")
    large = load(trained(255 * pictures(64), norm=False), input_shape=SHAPE)
    assert "as large as those of 0..255" in large.space.because


def test_a_path_that_is_not_affine_tells_nothing(transformer: Network) -> None:
    bent = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1)).eval()

    assert remembered(load(bent, input_shape=SHAPE)) is None
    assert remembered(transformer) is None
    assert bias_size(load(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(1)), input_shape=SHAPE)) is None


# ---- how the file takes it


def test_channels_last_modules_are_turned() -> None:
    net = trained(pictures(64))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x.permute(0, 3, 1, 2))
            return result

    network = load(Last().eval(), input_shape=SHAPE, layout="NHWC", pixels="0..1")
    images = pictures(4)

    assert (network.input_shape, network.space.layout) == (SHAPE, "NHWC")
    torch.testing.assert_close(network(images), net(images))


def test_bytes_are_whole_numbers() -> None:
    space = InputSpace(dtype="uint8")

    assert space.snapped(torch.tensor([-3.0, 0.4, 254.6, 300.0])).tolist() == [0, 0, 255, 255]


class Rows(nn.Module):
    """A first BatchNorm on the places of all images in a row, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        places: Tensor = self.linear(self.conv(x).flatten(2).transpose(1, 2))
        return self.norm(places.flatten(0, 1)).view_as(places)


def test_a_batch_norm_that_does_not_know_images_apart_says_nothing() -> None:
    assert remembered(load(Rows().eval(), input_shape=SHAPE)) is None
