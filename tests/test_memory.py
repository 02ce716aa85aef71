"""How much memory a run takes does not grow with the number of images, and how it is cut into pieces changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn

import dreamquant
from dreamquant import mapped
from dreamquant.errors import OutputError
from dreamquant.mapped import Pieces, in_parts, put_away, room
from dreamquant.methods import find_method, method_names
from dreamquant.network import live
from dreamquant.network.capture import capture
from dreamquant.network.graph import Network, joined
from dreamquant.quantization import walk
from dreamquant.quantization.histogram import FEW, Tally
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student
from dreamquant.samples import Samples
from dreamquant.synthesis import synthesize

WIDE = """
import resource, torch
from torch import nn
from dreamquant import memory_limit
from dreamquant.network.capture import capture
from dreamquant.quantization.quantize import quantize
from dreamquant.samples import Samples

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.SiLU(), nn.Flatten(2),
    nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))
with memory_limit(1):
    network = capture(net.eval(), (3, 512, 512))
    images = Samples(torch.randn(24, 3, 512, 512, generator=torch.Generator().manual_seed(0)))
    network(images.images[:1])
    before = most()
    quantize(network, images, activation_ranges="outputs", bias_correction="samples")
    print(most() - before)
"""
PIXELS, IMAGES = 256 * 256, 24
ONE_TENSOR = 4 * 32 * PIXELS * IMAGES // 2**20  # MiB of what the first layer gives for all images


def test_many_large_images_take_no_more_memory_than_a_few() -> None:
    run = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True)

    assert ONE_TENSOR == 192
    assert int(run.stdout) < 2 * ONE_TENSOR  # with all images at every node it was more than six times as much


# ---- pieces


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time, all that waits in files."""
    monkeypatch.setattr(live, "WORKING", 1)
    monkeypatch.setattr(walk, "HELD", 0)


def grids(student: Student) -> list[tuple[str, Tensor, Tensor]]:
    return [(one.quantizer.name, one.grid.scale, one.grid.zero_point) for one in student.tensors() if one.kind == "activation"]  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", [{}, {"activation_ranges": "outputs"}, {"activation_ranges": "mse", "effect_limit": 2}])
def test_the_size_of_pieces_changes_no_grid(
    residual: Network, calibration: Samples, changes: dict[str, object], request: pytest.FixtureRequest
) -> None:
    whole = grids(quantize(residual, calibration, bias_correction="samples", **changes))
    request.getfixturevalue("small_pieces")
    apart = grids(quantize(residual, calibration, bias_correction="samples", **changes))

    assert live.at_once(residual, 32) == 1
    assert len(whole) == len(apart) > 3
    for (name, scale, zero_point), (other, scaled, moved) in zip(whole, apart, strict=True):
        assert name == other
        torch.testing.assert_close(scaled, scale, rtol=1e-4, atol=0)
        torch.testing.assert_close(moved, zero_point)


def test_what_waits_in_files_comes_back_to_the_bit(
    residual: Network, calibration: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted() -> dict[str, list[Tensor]]:
        monkeypatch.setattr(live, "WORKING", 1)
        student = quantize(residual, calibration, bits="W4A4")
        layers = [node for node in student.network.graph.graph.nodes if "conv2d" in node.name and node.op == "call_function"]
        seen: dict[str, list[Tensor]] = {}

        def look(node: fx.Node, quantized: Tensor, exact: Tensor) -> None:
            seen.setdefault(node.name, []).extend((quantized, exact))

        walk.walk_by_layers(student.network, calibration.images[:5], layers, look, lambda node: torch.tensor(0.5))  # noqa: ARG005
        return seen

    held = shifted()
    monkeypatch.setattr(walk, "HELD", 0)
    filed = shifted()

    assert len(held) > 2
    for name, values in held.items():
        assert len(values) == 10
        assert all(map(torch.equal, values, filed[name]))


def test_few_images_go_at_once_where_the_limit_is_small(residual: Network) -> None:
    assert live.at_once(residual, 32) == 32
    with dreamquant.memory_limit(1e-5):
        assert live.at_once(residual, 32) == 1
    assert live.at_once(capture(nn.Conv2d(3, 4, 1).eval(), (3, 4, 4)), 7) == 7


# ---- values that are counted


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("method", method_names("ranges"))
def test_counted_values_have_the_ranges_of_all(method: str, relu: bool) -> None:
    images = torch.randn(4, 5, 80, 80, generator=torch.Generator().manual_seed(0)).pow(3)
    images = images.relu() if relu else images + 0.5
    tally = Tally(1)
    for piece in torch.split(images, 1):
        tally.see(0, piece)
    assert images.numel() > FEW
    assert tally.again
    for piece in torch.split(images, 1):
        tally.count(piece)
    values, find = tally.values(), find_method("ranges", method).function
    found, whole = (find(one, bits=8, symmetric=False) for one in (values, images.flatten(1).unsqueeze(0)))

    assert values.weights.sum().item() == values.count == images.numel()
    cell = images.abs().max().item() / 2048
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if method in ("minmax", "ema") else 12 * cell)


def test_tensors_side_by_side_have_the_images_that_they_share() -> None:
    tally = Tally(2)
    for start in (0.0, 1.0):
        tally.see(0, torch.tensor([[start, start + 1]]))
        tally.see(1, torch.tensor([[start - 5], [start + 5]]))  # two rows an image, as windows are

    assert not tally.again
    assert tally.values().lows.tolist() == [[-5.0, -4.0]]
    assert tally.values().highs.tolist() == [[5.0, 6.0]]
    assert sorted(tally.values().points.flatten().tolist()) == [-5, -4, 0, 1, 1, 2, 5, 6]


# ---- images in files


def test_what_lies_in_files_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, residual: Network) -> None:
    held = synthesize(residual, 5, method="fractal", seed=3)
    monkeypatch.setattr(mapped, "ROOM", 0)
    filed = synthesize(residual, 5, method="fractal", seed=3)
    images = room((5, *residual.input_shape)).copy_(held.images)
    put_away()

    assert torch.equal(images, held.images)
    assert torch.equal(filed.images, held.images)
    answers = joined(residual.answers, Pieces(images, 2))[0]
    torch.testing.assert_close(answers, residual(held.images))
    assert [len(part) for part, _ in in_parts(images, answers)] == [5]


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "ROOM", 0)
    monkeypatch.setattr(mapped.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"\(4, 3\) numbers, .* find no room in "):
        room((4, 3))
