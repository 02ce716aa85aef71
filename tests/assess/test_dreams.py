"""Measures of images against what is known of the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamquant.assess.dreams import diversity, measure
from dreamquant.errors import DataError, ModelError, OptionError
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network
from dreamquant.network.load import load
from dreamquant.network.outputs import restated
from dreamquant.quantization.plan import load_plan
from dreamquant.samples import Samples
from dreamquant.storage import write_samples

SHAPE = (3, 8, 6)
Fill = Callable[..., nn.Module]


def noise(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        scores: Tensor = self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))
        return scores


class Plain(nn.Module):
    """Positively homogeneous: twice the image, twice every activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.leaky_relu(self.conv1(x), 0.1)))


@pytest.fixture(scope="module")
def normed(fill: Fill) -> Network:
    """Its BatchNorms have seen 64 images of noise, `noise(64, seed=1)`."""
    return capture(fill(Normed(), SHAPE), SHAPE)


@pytest.fixture(scope="module")
def plain(fill: Fill) -> Network:
    return capture(fill(Plain(), SHAPE), SHAPE)


# ---- BatchNorm


def test_images_that_were_trained_on_are_near_and_others_are_not(normed: Network) -> None:
    seen = measure(normed, Samples(noise(64, seed=1))).norms
    other = measure(normed, Samples(noise(64, seed=2))).norms
    scaled = measure(normed, Samples(2 * noise(64, seed=1))).norms

    assert [norm.name for norm in seen] == ["batch_norm", "batch_norm_1"]
    for near, far in zip(seen, scaled, strict=True):
        assert near.mean_distance < 1e-3
        assert near.std_distance < 0.02  # BatchNorm remembers the unbiased variance
        assert far.std_distance > 0.3
    assert all(norm.mean_distance < 0.2 and norm.std_distance < 0.2 for norm in other)
    assert scaled[0].std_distance == pytest.approx(1, abs=0.02)  # a convolution of twice the image has twice the deviation


def test_distances_and_spread_are_those_of_their_definition(normed: Network, fill: Fill) -> None:
    module = fill(Normed(), SHAPE)
    images = 1.5 * noise(40, seed=3) + 0.3  # more than are run at once
    with torch.no_grad():
        entering = module.conv1(images).double()
    mu, sigma = module.norm1.running_mean, module.norm1.running_var.sqrt()
    found = measure(normed, Samples(images)).norms[0]

    assert found.mean_distance == pytest.approx(((entering.mean((0, 2, 3)) - mu).abs() / sigma).mean().item(), rel=1e-4)
    wanted = ((entering.std((0, 2, 3), correction=0) - sigma).abs() / sigma).mean().item()
    assert found.std_distance == pytest.approx(wanted, rel=1e-4)
    assert found.spread == pytest.approx((entering.mean((2, 3)).std(0, correction=0) / sigma).mean().item(), rel=1e-4)


def test_images_with_the_same_statistics_each_are_near_and_do_not_spread(normed: Network) -> None:
    """What comes of drawing every image to the statistics of the whole set: the batch is near, and homogeneous."""
    images = noise(32, seed=4)
    brightness = torch.linspace(-0.6, 0.6, 32).view(-1, 1, 1, 1)
    alike = measure(normed, Samples(images - images.mean((2, 3), keepdim=True))).norms[0]
    varied = measure(normed, Samples(images + brightness)).norms[0]

    assert alike.mean_distance < 0.05
    assert alike.spread < 0.5 * varied.spread


# ---- diversity


def test_equal_images_have_no_diversity_and_no_spread(normed: Network) -> None:
    found = measure(normed, Samples(noise(1).expand(5, *SHAPE)))

    assert found.feature_diversity == pytest.approx(0, abs=1e-6)
    assert found.pixel_diversity == pytest.approx(0, abs=1e-12)
    assert all(norm.spread == pytest.approx(0, abs=1e-5) for norm in found.norms)


def test_diversity_is_the_mean_distance_over_pairs() -> None:
    vectors = noise(7, shape=(5,)).double()
    pairs = [1 - F.cosine_similarity(vectors[i], vectors[j], dim=0).item() for i in range(7) for j in range(i)]

    assert diversity(vectors) == pytest.approx(sum(pairs) / len(pairs))
    assert diversity(3 * vectors) == pytest.approx(diversity(vectors))
    assert diversity(torch.eye(4)) == pytest.approx(1)
    assert diversity(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(2)
    assert diversity(torch.zeros(3, 2)) == 0
    assert diversity(torch.ones(1, 2)) == 0


def test_features_are_those_that_enter_the_last_layer(normed: Network, fill: Fill) -> None:
    module = fill(Normed(), SHAPE)
    images = noise(9)
    with torch.no_grad():
        hidden = F.relu(module.norm2(module.conv2(F.relu(module.norm1(module.conv1(images)))))).mean((2, 3))

    assert measure(normed, Samples(images)).feature_diversity == pytest.approx(diversity(hidden), rel=1e-4)


def test_features_of_a_last_convolution_are_averaged_over_positions(plain: Network, fill: Fill) -> None:
    module = fill(Plain(), SHAPE)
    images = noise(9)
    with torch.no_grad():
        hidden = F.leaky_relu(module.conv1(images), 0.1).mean((2, 3))

    assert measure(plain, Samples(images)).feature_diversity == pytest.approx(diversity(hidden), rel=1e-4)


# ---- classes


class Pixels(nn.Module):
    """The scores are the first pixels of the five channels."""

    def __init__(self, ends: str) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        scores = F.adaptive_max_pool2d(x, 1).flatten(1)
        if self.ends == "softmax":
            return torch.softmax(scores, 1)
        return {"scores": scores, "one": scores[:, :1], "map": 2 * x}[self.ends]


def scored(*classes: int, certainty: float = 20.0) -> Tensor:
    return certainty * F.one_hot(torch.tensor(classes), 5).float().view(-1, 5, 1, 1).expand(-1, -1, 2, 2)


@pytest.fixture(scope="module")
def pixels() -> Callable[[str], Network]:
    def made(ends: str) -> Network:
        return load(Pixels(ends).eval(), input_shape=(5, 2, 2), outputs={"output": "classes"} if ends == "scores" else {})

    return made


def test_collapse_to_one_class_is_seen(pixels: Callable[[str], Network]) -> None:
    one = measure(pixels("scores"), Samples(scored(3, 3, 3, 3))).classes
    all_of_them = measure(pixels("scores"), Samples(scored(0, 1, 2, 3, 4, 0))).classes
    assert one is not None
    assert all_of_them is not None

    assert (one.distinct, one.classes, one.top3) == (1, 5, 100.0)
    assert (all_of_them.distinct, all_of_them.top3) == (5, pytest.approx(400 / 6))
    assert one.confidence == pytest.approx(1, abs=1e-6)
    assert one.label_agreement is None


@pytest.mark.parametrize("ends", ["scores", "softmax"])
def test_confidence_is_the_mean_probability_of_the_first_choice(pixels: Callable[[str], Network], ends: str) -> None:
    images = torch.cat([scored(0, certainty=0.0), scored(2, certainty=float(np.log(4)))])
    found = measure(pixels(ends), Samples(images)).classes
    assert found is not None

    assert found.confidence == pytest.approx((1 / 5 + 4 / 8) / 2, rel=1e-5)


def test_labels_are_compared_with_predictions(pixels: Callable[[str], Network]) -> None:
    found = measure(pixels("scores"), Samples(scored(0, 1, 2, 3), torch.tensor([0, 1, 2, 4]))).classes
    assert found is not None

    assert found.label_agreement == 75.0


@pytest.mark.parametrize("ends", ["one", "map"])
def test_networks_that_score_no_classes_have_none(pixels: Callable[[str], Network], ends: str) -> None:
    found = measure(pixels(ends), Samples(scored(0, 1, 2)))

    assert found.classes is None
    assert found.pixel_diversity == pytest.approx(1)


def test_a_detector(fill: Fill) -> None:
    class Detector(nn.Module):
        """Two heads at two scales, joined."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.fine, self.coarse = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.norm(self.stem(x)))
            return torch.cat([self.fine(x).flatten(2), self.coarse(F.max_pool2d(x, 2)).flatten(2)], 2).transpose(1, 2)

    found = measure(capture(fill(Detector(), SHAPE), SHAPE), Samples(noise(5)), real=noise(5))

    assert found.classes is None
    assert len(found.norms) == 1
    assert found.feature_diversity > 0
    assert found.coverage is not None
    assert [site.ratio for site in found.coverage.sites] == [1.0]


# ---- ranges


@pytest.mark.parametrize("plan", ["zeroq", "deploy", "brecq"])
@pytest.mark.parametrize(("factor", "ratio"), [(1.0, 1.0), (2.0, 2.0), (0.25, 0.25)])
def test_coverage_is_the_factor_of_the_image(plain: Network, plan: str, factor: float, ratio: float) -> None:
    images = noise(40)
    found = measure(plain, Samples(factor * images), real=images, plan=plan).coverage
    assert found is not None

    assert (found.plan, found.real_images) == (plan, 40)
    assert [site.ratio for site in found.sites] == pytest.approx([ratio] * len(found.sites))
    assert (found.mean, found.worst) == pytest.approx((ratio, ratio))


def test_coverage_names_the_tensors_that_the_plan_quantizes(plain: Network) -> None:
    found = measure(plain, Samples(noise(3)), real=noise(3)).coverage
    assert found is not None

    assert [site.tensor for site in found.sites] == ["leaky_relu", "relu"]


def test_the_worst_ratio_is_the_furthest_as_a_factor(pixels: Callable[[str], Network]) -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (F.relu(x[:, i : i + 1]) for i in range(3))
            return a + b + c

    network = capture(Split().eval(), (3, 2, 2))
    real = torch.zeros(2, 3, 2, 2)
    real[1] = 1
    dreamt = real * torch.tensor([1.5, 0.5, 1.0]).view(1, 3, 1, 1)
    found = measure(network, Samples(dreamt), real=real).coverage
    assert found is not None

    assert [site.ratio for site in found.sites] == pytest.approx([1.5, 0.5, 1.0])
    assert (found.mean, found.worst) == pytest.approx((1.0, 0.5))
    collapsed = measure(network, Samples(torch.zeros_like(real)), real=real).coverage
    assert collapsed is not None
    assert (collapsed.mean, collapsed.worst) == (0, 0)


# ---- any network


def test_without_batchnorm_the_rest_is_measured(plain: Network) -> None:
    found = measure(plain, Samples(noise(5)), real=noise(5, seed=1))

    assert found.norms == []
    assert found.coverage is not None
    assert 0 < found.feature_diversity < 1


def test_attention(transformer: Network) -> None:
    found = measure(transformer, Samples(noise(5, shape=transformer.input_shape)), real=noise(5, shape=transformer.input_shape))
    assert found.classes is not None
    assert found.coverage is not None

    assert found.classes.classes == 5
    assert found.coverage.mean == pytest.approx(1)


def test_a_network_of_one_batch_size_is_measured_as_one_of_any(normed: Network) -> None:
    normed = replace(normed, outputs=restated(normed, {"output": "classes"}))
    bound = replace(normed, batch=2)
    images = noise(5)
    first, second = (measure(network, Samples(images), real=noise(5, seed=1)) for network in (bound, normed))

    assert first.images == 5
    assert first.feature_diversity == pytest.approx(second.feature_diversity, rel=1e-5)
    assert [norm.distances for norm in first.norms] == [pytest.approx(norm.distances, rel=1e-5) for norm in second.norms]
    assert first.classes is not None
    assert second.classes is not None
    assert astuple(first.classes)[:3] == astuple(second.classes)[:3]
    assert first.coverage is not None
    assert second.coverage is not None
    assert first.coverage.mean == pytest.approx(second.coverage.mean, rel=1e-5)


def test_the_network_stays_as_it_was(residual: Network, calibration: Samples) -> None:
    before = {name: value.clone() for name, value in residual.graph.state_dict().items()}
    code = residual.graph.code
    measure(residual, calibration, real=calibration.images, plan="deploy")

    assert residual.graph.code == code
    after = residual.graph.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_measures_are_plain_numbers(residual: Network, calibration: Samples) -> None:
    found = asdict(measure(residual, calibration, real=calibration.images))

    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---- what is refused


def refused(message: str, call: Callable[[], object], error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_are_refused(normed: Network) -> None:
    good, other = Samples(noise(2)), noise(2, shape=(3, 4, 4))
    refused(r"samples are \(2, 3, 4, 4\); the network takes \(N, 3, 8, 6\)", lambda: measure(normed, Samples(other)))
    refused(r"samples are \(0, 3, 8, 6\)", lambda: measure(normed, Samples(noise(0))))
    refused(r"real images are \(2, 3, 4, 4\)", lambda: measure(normed, good, real=other))
    refused("samples hold values that are NaN or infinite", lambda: measure(normed, Samples(noise(2) / 0)))
    refused(r"labels are \(3,\); 2 images", lambda: measure(normed, Samples(noise(2), torch.arange(3))))
    refused("output is NaN or infinite on 2 of 2", lambda: measure(normed, Samples(3e38 * noise(2).sign())), ModelError)
    refused("unknown plan 'zerocue'", lambda: measure(normed, good, plan="zerocue"), OptionError)


def test_ranges_that_cannot_be_compared_are_refused(plain: Network) -> None:
    linear = capture(nn.Conv2d(3, 4, 3).eval(), SHAPE)
    refused("plan 'zeroq' quantizes no activation", lambda: measure(linear, Samples(noise(2)), real=noise(2)))
    refused("all 2 activations .* constant", lambda: measure(plain, Samples(noise(2)), real=torch.zeros(2, *SHAPE)))
    assert measure(linear, Samples(noise(2)), real=noise(2), plan=load_plan("deploy")).coverage is not None


# ---- the command


@pytest.fixture
def dreamt(digits: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Ten dreams of the digits network's size, with labels."""

    def write(suffix: str) -> Path:
        path = tmp_path / f"dreams{suffix}"
        write_samples(Samples(noise(10, shape=(1, 16, 16)), torch.arange(10)), None, path)  # type: ignore[arg-type]
        return path

    return write


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_command_shows_what_was_measured(
    suffix: str, command: Callable[..., Any], digits: Path, dreamt: Callable[[str], Path]
) -> None:
    arguments = ("dreams", digits / "digits.pt2", dreamt(suffix), "--data", digits / "digits_test.npz")
    shown = command(*arguments)
    found = command(*arguments, "--json")
    values = json.loads(found.out)

    assert (shown.status, shown.err, found.status, found.err) == (0, "", 0, "")
    assert values["images"] == values["coverage"]["real_images"] == 10
    assert len(values["norms"]) == 9
    assert values["classes"]["label_agreement"] is not None
    words = ("diversity", "of 10, the most frequent three", "predicted as labelled", "10 real images", "spread", "batch_norm_8")
    assert all(word in shown.out for word in words)
    assert shown.out.index("ranges") < shown.out.index("batch_norm_8")


def test_the_command_without_batchnorm_and_real_images(
    command: Callable[..., Any], digits: Path, dreamt: Callable[[str], Path]
) -> None:
    shown = command("dreams", digits / "digits_bnfolded.onnx", dreamt(".npz"))

    assert shown.status == 0
    assert "none" in shown.out.split("BatchNorm")[1]
    assert "ranges" not in shown.out


def test_what_the_command_refuses(
    command: Callable[..., Any], digits: Path, dreamt: Callable[[str], Path], tmp_path: Path, residual_onnx: Path
) -> None:
    model, samples = digits / "digits.pt2", dreamt(".npz")
    (tmp_path / "text.npz").write_text("no samples")
    np.savez(tmp_path / "small.npz", images=np.zeros((2, 1, 4, 4), np.float32))
    np.savez(tmp_path / "three.npz", images=np.zeros((2, 3, 11, 9), np.float32))
    for arguments, words in (
        ((model, tmp_path / "none.npz"), ("none.npz",)),
        ((model, tmp_path / "text.npz"), ("text.npz", "not a readable")),
        ((model, tmp_path / "small.npz"), ("(2, 1, 4, 4)", "(N, 1, 16, 16)")),
        ((model, samples, "--data", tmp_path / "nowhere"), ("nowhere does not exist",)),
        ((model, samples, "--labels", "labels.csv"), ("labels.csv", "--data")),
        ((model, samples, "--plan", "zerocue"), ("unknown plan 'zerocue'",)),
        ((residual_onnx, tmp_path / "three.npz", "--data", digits / "digits_test.npz"), ("--mean and --std",)),
    ):
        finished = command("dreams", *arguments)
        assert finished.status == 2
        assert finished.out == ""
        assert finished.err.count("\n") == 1
        assert all(word in finished.err for word in words)
