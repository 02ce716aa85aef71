"""Quantize the digits network without data, and see what is left of its accuracy on images it never saw.

Both of its files, with BatchNorm and without, become 8-bit and 4-bit ONNX files: by the default recipe, and by the
baseline that is calibrated on Gaussian noise. All of them are then run in ONNX Runtime on the labelled test images,
which nothing else here uses.

    python examples/demo.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw
from rich import box
from rich.console import Console
from rich.table import Table

import dreamquant
from dreamquant.assess.assess import float_file
from dreamquant.assess.evaluate import evaluate
from dreamquant.assess.labelled import LabelledImages, load_labelled
from dreamquant.files import atomic_path
from dreamquant.runtime import onnx_runner
from dreamquant.storage import contact_sheet

DIGITS = Path(__file__).parent / "digits"
MODELS = ("digits.pt2", "digits_bnfolded.onnx")
BITS = ("W8A8", "W4A4")
SEED = 0
ZOOM, MARGIN = 3, 20  # of the pictures, in pixels
NOTES = """
noise    the recipe `noise`: Gaussian noise, nothing learnt
size     of the file, where the float network's ONNX file has 1
speed    likewise, for one image on one thread; so small a network has little
         to gain, and 4 bits save room, not time
file =   share of the calibration images on which the file in ONNX Runtime has
student  the top-1 of the quantized network that it was written from
seconds  for dreaming, quantizing, writing, proving and measuring
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: a model at some bits."""

    model: str
    bits: str
    float_top1: float
    noise_top1: float
    top1: float
    result: dreamquant.Result


def main() -> None:
    began = time.perf_counter()
    console = Console()
    folder = Path("runs") / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    data = load_labelled(DIGITS / "digits_test.npz")
    rows = []
    for name in MODELS:
        network = dreamquant.load(DIGITS / name)
        float_top1 = top1(float_file(network, folder), network, data)
        for bits in BITS:
            console.print(f"quantizing {name} to {bits} without data ...")
            row = quantize(name, bits, float_top1, network, data, folder)
            rows.append(row)
        place = folder / f"{Path(name).stem}.png"
        picture(row.result, network, data, place)
        console.print(f"images made and real ones: {place}")
    console.print(table(rows, len(data)))
    console.print(NOTES, highlight=False)
    console.print(f"the files lie in {folder}; {time.perf_counter() - began:.0f} s in all", highlight=False)


def quantize(name: str, bits: str, float_top1: float, network: dreamquant.Network, data: LabelledImages, folder: Path) -> Row:
    """Two files, by the default recipe and from noise, and their accuracy."""
    stem = f"{Path(name).stem}.{bits.lower()}"
    result = dreamquant.run(DIGITS / name, folder / f"{stem}.onnx", bits=bits, seed=SEED)
    noise = dreamquant.run(DIGITS / name, folder / f"{stem}.noise.onnx", recipe="noise", bits=bits, seed=SEED)
    noise_top1, own_top1 = (top1(run.artifact.path, network, data) for run in (noise, result))
    return Row(name, bits, float_top1, noise_top1, own_top1, result)


def top1(file: Path, network: dreamquant.Network, data: LabelledImages) -> float:
    """Accuracy of an ONNX file in ONNX Runtime, in percent."""
    run = onnx_runner(file)
    return evaluate(run, data, input_shape=network.input_shape, mean=network.mean, std=network.std).top1


def table(rows: list[Row], images: int) -> Table:
    """The rows as they are to be read."""
    found = Table(
        *(
            "model",
            "bits",
            "top-1 %\nfloat",
            "top-1 %\nnoise",
            "top-1 %\nDreamQuant",
            "size",
            "speed",
            "file =\nstudent",
        ),
        "seconds",
        title=f"{images} labelled test images in {rows[0].result.assessment.latency.runtime}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in found.columns[2:]:
        column.justify = "right"
    for row in rows:
        artifact, assessment = row.result.artifact, row.result.assessment
        found.add_row(
            row.model,
            row.bits,
            *(f"{value:.2f}" for value in (row.float_top1, row.noise_top1, row.top1)),
            *(f"{value:.2f}" for value in (artifact.size / assessment.float_size, assessment.latency.ratio)),
            f"{artifact.verification.top1_agreement:.1f} %",
            f"{sum(row.result.seconds.values()):.1f}",
        )
    return found


def picture(result: dreamquant.Result, network: dreamquant.Network, data: LabelledImages, place: Path) -> None:
    """The images that calibrated the network, and as many real ones, side by side."""
    samples = result.samples
    real, _ = next(data.batches(len(samples), input_shape=network.input_shape, mean=network.mean, std=network.std))
    sheets = [contact_sheet(shown, network) for shown in (samples, replace(samples, images=samples.images.new_tensor(real)))]
    captions = (f"made without data ({samples.method})", "real test images, never shown")
    width, height = (ZOOM * side for side in sheets[0].size)
    sheet = Image.new("L", (2 * width + MARGIN, height + MARGIN), 255)
    for number, (part, caption) in enumerate(zip(sheets, captions, strict=True)):
        left = number * (width + MARGIN)
        sheet.paste(part.convert("L").resize((width, height), Image.Resampling.NEAREST), (left, MARGIN))
        ImageDraw.Draw(sheet).text((left, 3), caption, fill=0)
    with atomic_path(place) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
