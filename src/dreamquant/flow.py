"""The flow, on one screen. The command line, the Python API and the benchmarks all call it."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, Unpack

import onnx
import onnxruntime
import torch
from torch import nn

from dreamquant.allocation import Allocation, LayerDamage, allocate, sensitivities
from dreamquant.assess.assess import Assessment, assess
from dreamquant.assess.fastest import Fastest, hastened
from dreamquant.assess.probes import stages as probe_stages
from dreamquant.assess.trust import unlike
from dreamquant.devices import CPU, device_name
from dreamquant.errors import OptionError
from dreamquant.estimate import expected_seconds
from dreamquant.exporters.export import Artifact, check_format, export
from dreamquant.exporters.qdq import check_writable
from dreamquant.files import atomic_write, check_output, in_use
from dreamquant.mapped import put_away
from dreamquant.methods import SEEDS, check_seed
from dreamquant.network.fingerprint import fingerprint
from dreamquant.network.graph import Network
from dreamquant.network.load import Loading, load
from dreamquant.network.scores import scores_classes
from dreamquant.network.statistics import batch_norms
from dreamquant.plain import plain_torch
from dreamquant.quantization.choice import Choice, choose
from dreamquant.quantization.plan import Bits, Plan, parse_bits
from dreamquant.quantization.quantize import quantize
from dreamquant.quantization.student import Student, check_layers
from dreamquant.real_images import real_images
from dreamquant.recipe import Recipe, Synthesis, load_recipe, resolve
from dreamquant.reconstruction import reconstruct
from dreamquant.samples import joined
from dreamquant.storage import load_samples, save_samples
from dreamquant.synthesis import Samples, check_fed, synthesize, widened
from dreamquant.training import train

P = ParamSpec("P")
Progress = Callable[[str, int, int, float], None]  # (stage, steps done, steps in all, loss)
LARGE = 96 * 96  # pixels of an image
RESULT, RESULT_BYTES = "result.json", 2**20  # what the run folder must have room for before the output is written
WITH_IMAGES = "The file was calibrated on images that were given, and is measured on those of them that were held out."
LARGEST_SHARE = 0.5  # of the float file's size that an output may take; checked against the disk before work begins


@dataclass(frozen=True)
class Result:
    """What came of a run: the file, what is known of it, the recipe as it was run, and seconds by stage.

    `network` is the float network as it was loaded, on the processor, `student` the quantized one that the file was written from,
    `threads` what torch shared its sums out to and `device` what it computed on, in words, which the bits depend on.
    """

    artifact: Artifact
    assessment: Assessment
    recipe: Recipe
    seed: int
    seconds: dict[str, float]
    samples: Samples
    choice: Choice
    allocation: Allocation
    network: Network
    student: Student
    threads: int
    device: str
    fastest: Fastest | None = None

    def summary(self) -> dict[str, Any]:
        """Everything but the images and the networks, ready for JSON."""
        return {
            "file": str(self.artifact.path),
            "bytes": self.artifact.size,
            "float_bytes": self.assessment.float_size,
            "size_ratio": self.artifact.size / self.assessment.float_size,
            "calibration": {"method": self.samples.method, "images": len(self.samples)},
            "input": asdict(self.network.space) | {"sentence": self.network.space.sentence()},
            "remarks": list(self.network.remarks),
            "verification": asdict(self.artifact.verification),
            "target": None if self.artifact.conformity is None else self.artifact.conformity.summary(),
            "agreement": asdict(self.assessment.agreement) | {"interval": self.assessment.agreement.interval},
            "outputs": [asdict(output) for output in self.network.outputs],
            "latency": asdict(self.assessment.latency),
            "fast": self.assessment.fast,
            "layer_times": [asdict(layer) for layer in self.assessment.layer_times],
            "fastest": None if self.fastest is None else asdict(self.fastest),
            "trust": None if self.assessment.trust is None else asdict(self.assessment.trust),
            "trust_unknown": self.assessment.trust_unknown,
            "probes": [asdict(probe) for probe in self.assessment.probes],
            "layers": [asdict(layer) for layer in self.assessment.layers],
            "float_layers": self.assessment.float_layers,
            "choice": asdict(self.choice) | {"plan": self.choice.plan.name},
            "allocation": {"layers": self.allocation.layers, **self.allocation.totals},
            "seconds": self.seconds,
            "recipe": self.recipe.model_dump(exclude_none=True),
            "seed": self.seed,
            "threads": self.threads,
            "device": self.device,
            "versions": versions(),
        }


def _alone(flow: Callable[P, Result]) -> Callable[P, Result]:
    """The flow with its run folder, where it has one, to itself."""

    @wraps(flow)
    def held(*args: P.args, **kwargs: P.kwargs) -> Result:
        folder = kwargs.get("run_dir")
        with nullcontext() if folder is None else in_use(Path(str(folder))):
            return flow(*args, **kwargs)

    return held


@_alone
@plain_torch()
def run(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    recipe: str = "auto",
    bits: str | None = None,
    plan: str | None = None,
    target: str | None = None,
    budget: str = "standard",
    settings: Iterable[str] = (),
    images: str | os.PathLike[str] | None = None,
    mix: bool = False,
    resize: str = "cover",
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    estimate: bool = True,
    fastest: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    **loading: Unpack[Loading],
) -> Result:
    """Quantize `model` without data into the file `output`, prove the file, and say how far to trust it.

    `loading` (`input_shape`, `mean`, `std`, `pixels`, `layout`, `channels`, `force`, `trust`, `outputs`, `device`) is as in
    `load`. `target` is a runtime's or a device's plan, in place of the recipe's: the file keeps its rules, or is not written.
    `settings` are `stage.option=value`. Where there are `images` that may be used, a folder, .zip or .npz, they
    calibrate in place of the recipe's, or with `mix` beside them, and some of them are held out to measure on; `resize` is as
    in `LabelledImages.batches`. With `run_dir`, samples and reconstructed units are kept there and a run with the same recipe
    and seed goes on from them. With `fastest`, a file that is no faster than float leaves in float what makes it faster;
    which tensors these are, and so the file, depends on times that were taken. With `estimate`, the loss of accuracy is told
    from the answers on more images. `announce` hears, before the work begins, what will be done, why, and how long it may
    take. Raises a `DreamQuantError` for whatever cannot be done; `output` is then as it was.
    """
    path, seed = Path(output), check_seed(seed)
    _check_output(model, path)
    _check_run_folder(run_dir)
    if mix and images is None:
        raise OptionError("mix is set, and there are no images to mix synthetic ones with: give images")
    known = load_recipe(recipe)
    network = load(model, **loading)
    check_fed(network)
    device, home = device_name(network.device), network.to(CPU)
    chosen = resolve(known, *_kind(network), budget=budget, bits=bits, plan=plan, target=target, settings=settings)
    whole, width = chosen.quantization.resolved(), parse_bits(chosen.quantization.bits)
    if fastest and whole.target is not None and not whole.target.proven:
        raise OptionError(f"what is fastest is found out in ONNX Runtime, which says nothing of {whole.name}: leave fastest out")
    check_layers(network, whole)
    check_writable(network, whole, chosen.quantization.bits)
    stage = chosen.synthesis
    given = None if images is None else real_images(network, images, resize=resize, seed=seed)
    asked = probe_stages(stage.method) if estimate and given is None and not unlike(network) else {}
    if announce is not None:
        place = "" if network.device == CPU else f"; computed on {device}"
        announce(f"{network.source.text}: {network.space.sentence()}{place}")
        for line in (*network.remarks, *(f"output {answer}" for answer in network.outputs)):
            announce(line)
        announce(_intention(chosen, expected_seconds(network, chosen, asked.values()), network.device == CPU))
    clock = _Clock()
    dreamer = _Dreamer(network, run_dir, progress)
    samples = dreamer.calibration(stage, seed) if given is None or mix else given[0]
    if given is not None and mix:
        samples = joined(given[0], samples)
    clock.lap("synthesis")
    dreams = (stage.held_out, (seed + 1) % SEEDS, stage.options)
    held_out = given[1] if given is not None else dreamer("held-out", stage.method, *dreams)
    clock.lap("held_out_synthesis")
    choice = choose(network, samples, whole, width, telling(progress, "choosing ranges"))
    clock.lap("choice")
    allocation = allocate(
        network,
        samples,
        choice.plan,
        bits=chosen.quantization.bits,
        method=chosen.allocation.method,
        callback=telling(progress, "weighing layers"),
        **chosen.allocation.options,
    )
    clock.lap("allocation")
    final, hurried = allocation.plan, None
    if fastest:
        final, hurried = hastened(home, samples, allocation.plan, width, telling(progress, "timing what may be in float"))
    clock.lap("fastest")
    student = quantize(network, samples, bits=chosen.quantization.bits, plan=final)
    clock.lap("quantization")
    student = reconstruct(
        student,
        samples,
        method=chosen.reconstruction.method,
        seed=seed,
        callback=telling(progress, "reconstructing"),
        folder=None if run_dir is None else Path(run_dir) / "reconstruction",
        **chosen.reconstruction.options,
    )
    clock.lap("reconstruction")
    if chosen.training is not None:
        student = train(
            network,
            student,
            samples,
            method=chosen.training.method,
            seed=seed,
            callback=telling(progress, "training"),
            folder=None if run_dir is None else Path(run_dir) / "training",
            **chosen.training.options,
        )
    student = student.to(CPU)  # to be written and proven
    clock.lap("training")
    _check_run_folder(run_dir)
    artifact = export(student, path, samples, metadata=_metadata(chosen, seed, samples, choice, hurried, device))
    clock.lap("export")
    probes = [
        dreamer(what, method, count, (seed + 2) % SEEDS, options, confidence=False)
        for what, (method, count, options) in asked.items()
    ]
    clock.lap("probe_synthesis")
    learned = chosen.training is not None or chosen.reconstruction.method != "nearest"
    why = {} if given is None or not estimate else {"unasked": WITH_IMAGES}
    assessment = assess(home, student, artifact, held_out, probes, learned=learned, **why)
    clock.lap("assessment")
    threads = torch.get_num_threads()
    result = Result(
        artifact,
        assessment,
        chosen,
        seed,
        clock.seconds,
        samples,
        choice,
        allocation,
        home,
        student,
        threads,
        device,
        hurried,
    )
    if run_dir is not None:
        atomic_write(Path(run_dir) / RESULT, json.dumps(result.summary(), indent=2).encode())
    return result


def ranked(
    network: Network, recipe: Recipe, plan: Plan, bits: Bits, seed: int = 0, progress: Progress | None = None
) -> list[LayerDamage]:
    """Layers by the damage that each alone does to the network's answers, worst first, on images dreamt by the recipe."""
    chosen = resolve(recipe, *_kind(network))
    samples = _Dreamer(network, None, progress).calibration(chosen.synthesis, seed)
    damages = sensitivities(network, samples, plan, str(bits), telling(progress, "weighing layers"))
    return sorted(damages, key=lambda layer: -layer.both)


def _kind(network: Network) -> tuple[bool, bool, bool, bool]:
    """What decides on variants: whether a network has BatchNorms, sees photographs, sees large images, scores classes."""
    large = math.prod(network.input_shape[1:]) >= LARGE
    return bool(batch_norms(network)), network.sees_photographs, large, scores_classes(network)


def telling(progress: Progress | None, stage: str) -> Callable[..., None] | None:
    """A callback that hears steps done, steps in all and, where there is one, a loss, and passes them on as those of a stage."""
    if progress is None:
        return None
    return lambda done, steps, loss=0.0: progress(stage, done, steps, loss)


def _intention(recipe: Recipe, seconds: float, on_cpu: bool) -> str:
    """What a recipe will do and how long it may take, in one sentence."""
    synthesis, quantization = recipe.synthesis, recipe.quantization
    wider = ", their mirror images and as many procedural scenes that show them" if synthesis.widen else ""
    steps = [f"{synthesis.count} images by {synthesis.method}{wider}", f"{quantization.bits} by plan {quantization.plan}"]
    if recipe.allocation.method != "uniform":
        steps.insert(1, f"layers by {recipe.allocation.method}")
    if recipe.reconstruction.method != "nearest":
        steps.append(f"reconstruction by {recipe.reconstruction.method}")
    if recipe.training is not None:
        steps.append(f"training by {recipe.training.method}")
    if recipe.left_out:
        steps.append(f"without {', '.join(recipe.left_out)}, which {quantization.plan} does not let it change")
    why = f" ({recipe.because})" if recipe.because else ""
    return f"recipe {recipe.name}{why}: {', '.join(steps)}; about {seconds:.0f} {'CPU ' if on_cpu else ''}seconds"


def versions() -> dict[str, str]:
    """Versions of all that a result depends on."""
    return {
        "dreamquant": version("dreamquant"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _check_output(model: str | os.PathLike[str] | nn.Module, output: Path) -> None:
    check_format(output)
    source = None if isinstance(model, nn.Module) else Path(os.fspath(model))
    exists = source is not None and source.is_file()
    size = source.stat().st_size if source is not None and exists else 0
    check_output(output, inputs=[source] if source is not None and exists else [], need_bytes=int(size * LARGEST_SHARE))


def _check_run_folder(run_dir: str | os.PathLike[str] | None) -> None:
    """`OutputError` where what comes of a run could not be written into its folder, which must not be found out after it."""
    if run_dir is not None:
        check_output(Path(run_dir) / RESULT, need_bytes=RESULT_BYTES)


class _Dreamer:
    """Makes images, or finds those that an earlier run in the same folder made with the same settings."""

    def __init__(self, network: Network, run_dir: str | os.PathLike[str] | None, progress: Progress | None) -> None:
        self._network, self._progress = network, progress
        self._folder = None if run_dir is None else Path(run_dir)

    def calibration(self, stage: Synthesis, seed: int) -> Samples:
        """The images that a recipe's synthesis calibrates on."""
        samples = self("calibration", stage.method, stage.count, seed, stage.options)
        return widened(self._network, samples) if stage.widen else samples

    def __call__(
        self, what: str, method: str, count: int, seed: int, options: dict[str, Any], *, confidence: bool = True
    ) -> Samples:
        made_by = {
            "method": method,
            "count": count,
            "seed": seed,
            "options": options,
            "network": fingerprint(self._network),
        }
        place = None if self._folder is None else self._folder / f"{what}.safetensors"
        if place is not None:
            kept = load_samples(place, made_by)
            if kept is not None:
                return kept
        callback = telling(self._progress, f"dreaming {what} images")
        samples = synthesize(self._network, count, method=method, seed=seed, callback=callback, confidence=confidence, **options)
        if place is not None:
            save_samples(samples, place, made_by)
        return samples


def _metadata(
    recipe: Recipe, seed: int, samples: Samples, choice: Choice, hurried: Fastest | None, device: str
) -> dict[str, str]:
    made = {
        "calibration": {"method": samples.method, "images": len(samples)},
        "recipe": recipe.model_dump(exclude_none=True, exclude={"published"}),
        "ranges": choice.sentence(),
        "fastest": None if hurried is None else str(hurried),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": versions(),
    }
    return {"dreamquant.run": json.dumps(made)}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        put_away()
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now
