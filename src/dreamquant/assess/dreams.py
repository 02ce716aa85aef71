"""What can be said of dreamt images: how near they are to what the network remembers, how varied, of which classes, how wide.

A small distance to the BatchNorm statistics is no proof of good images; the other measures show what it hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dreamquant.devices import CPU
from dreamquant.errors import DataError, ModelError
from dreamquant.mapped import Pieces
from dreamquant.network.graph import Network, joined
from dreamquant.network.live import at_once
from dreamquant.network.scores import scores_classes
from dreamquant.network.statistics import EPSILON, BatchNormStatistics, batch_norms, probe, watch
from dreamquant.quantization.plan import Plan, load_plan, parse_bits
from dreamquant.quantization.sites import activation_sites
from dreamquant.quantization.student import transformed
from dreamquant.samples import Samples

CHUNK = 32  # images run at once
MOST_FREQUENT = 3


@dataclass(frozen=True)
class NormMeasures:
    """Images against what one BatchNorm remembers; means over channels, in units of each channel's remembered deviation.

    `mean_distance` is |mean - mu| / sigma and `std_distance` |std - sigma| / sigma, mean and std over the whole batch.
    `spread` is the deviation, over images, of the mean of each image: what is lost when every single image is drawn to the
    statistics of the whole training set (Zhang et al., Diversifying Sample Generation, CVPR 2021).
    """

    name: str
    mean_distance: float
    std_distance: float
    spread: float

    @property
    def distances(self) -> tuple[float, float, float]:
        """`mean_distance`, `std_distance` and `spread`."""
        return self.mean_distance, self.std_distance, self.spread


@dataclass(frozen=True)
class ClassMeasures:
    """What the network takes the images for.

    `distinct` of `classes` are predicted; `top3` is the share of the three most frequent ones in percent; `confidence` the mean
    probability of the first choice; `label_agreement` the percentage predicted as labelled, None where there are no labels.
    """

    distinct: int
    classes: int
    top3: float
    confidence: float
    label_agreement: float | None


@dataclass(frozen=True)
class SiteCoverage:
    """A quantized tensor: the width of its range (largest minus smallest value) on the images over that on the real ones."""

    tensor: str
    ratio: float


@dataclass(frozen=True)
class RangeCoverage:
    """Ranges of the activations that a plan quantizes: above 1 they are inflated, below 1 real values are clipped.

    `mean` is the plain mean over `sites`, `worst` the ratio that is furthest from 1 as a factor. Ranges grow with the number of
    images: `real_images` should be as many as there are samples. Tensors that are constant on them are left out.
    """

    plan: str
    real_images: int
    mean: float
    worst: float
    sites: list[SiteCoverage]


@dataclass(frozen=True)
class DreamMeasures:
    """Measures of images; `norms` is empty for a network without BatchNorm, `classes` None where the network scores none.

    Diversities are mean pairwise distances, 1 - cosine: of the features that enter the last layer, averaged over positions, and
    of the images in the input space. Zero for one image, and for equal ones.
    """

    images: int
    norms: list[NormMeasures]
    feature_diversity: float
    pixel_diversity: float
    classes: ClassMeasures | None
    coverage: RangeCoverage | None


def measure(network: Network, samples: Samples, *, real: Tensor | None = None, plan: str | Plan = "zeroq") -> DreamMeasures:
    """Measure samples, and against `real` images (N, C, H, W), if given, the ranges of the activations that `plan` quantizes.

    Raises `DataError` for images that do not fit the network or are not finite, for labels that are not one for each image, and
    where the plan quantizes nothing that could be compared; `ModelError` when the network's output is not finite;
    `OptionError` for an unknown plan.
    """
    network = network.to(CPU)
    plan = load_plan(plan) if isinstance(plan, str) else plan
    images, labels = samples.images, samples.labels
    _check(network, images, "samples")
    if labels is not None and labels.shape != (len(samples),):
        raise DataError(f"labels are {tuple(labels.shape)}; {len(samples)} images need one label each")
    if real is not None:
        _check(network, real, "real images")
    scores, embedding, *statistics = _observe(network, images)
    broken = int((~torch.isfinite(scores.flatten(1))).any(1).sum())
    if broken:
        raise ModelError(f"the network's output is NaN or infinite on {broken} of {len(samples)} images")
    return DreamMeasures(
        images=len(samples),
        norms=[_norm(norm, found) for norm, found in zip(batch_norms(network), statistics, strict=True)],
        feature_diversity=diversity(embedding),
        pixel_diversity=diversity(images.flatten(1)),
        classes=_classes(scores.softmax(1) if scores_classes(network) else None, labels),
        coverage=None if real is None else _coverage(network, images, real, plan),
    )


def diversity(vectors: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of vectors (N, D): the variance of the vectors at length 1.

    A vector of zeros counts as one at distance 0 from its like and 1/2 from others. Zero where there is one vector only.
    """
    if len(vectors) < 2:
        return 0.0
    return F.normalize(vectors.double(), dim=1).var(0).sum().item()


def _check(network: Network, images: Tensor, what: str) -> None:
    if images.shape[1:] != network.input_shape or not len(images):
        takes = ", ".join(map(str, network.input_shape))
        raise DataError(f"{what} are {tuple(images.shape)}; the network takes (N, {takes}), N at least 1")
    if not torch.isfinite(images).all():
        raise DataError(f"{what} hold values that are NaN or infinite")


def _observe(network: Network, images: Tensor) -> list[Tensor]:
    """Scores, embedding (N, D), and for each BatchNorm mean and variance (N, 2, C) of what enters it, image by image."""
    show = probe(network)

    def run(piece: Tensor) -> list[Tensor]:
        shown = show(piece)
        return [shown.scores, shown.embedding, *(_moments(feature) for feature in shown.features)]

    return joined(run, Pieces(images, at_once(network, CHUNK, kept=True)))


def _moments(features: Tensor) -> Tensor:
    """Mean and variance (N, 2, C) of each channel of each image, in double: unlike a loss, it is to be exact."""
    variance, mean = torch.var_mean(features.double().reshape(*features.shape[:2], -1), 2, correction=0)
    return torch.stack([mean, variance], 1)


def _norm(norm: BatchNormStatistics, found: Tensor) -> NormMeasures:
    means, variances = found.unbind(1)
    std = (variances.mean(0) + means.var(0, correction=0) + EPSILON).sqrt()
    return NormMeasures(
        name=norm.name,
        mean_distance=((means.mean(0) - norm.mean).abs() / norm.std).mean().item(),
        std_distance=((std - norm.std).abs() / norm.std).mean().item(),
        spread=(means.std(0, correction=0) / norm.std).mean().item(),
    )


def _classes(probabilities: Tensor | None, labels: Tensor | None) -> ClassMeasures | None:
    if probabilities is None:
        return None
    confidence, predicted = probabilities.max(1)
    counts = predicted.bincount(minlength=probabilities.shape[1])
    return ClassMeasures(
        distinct=int((counts > 0).sum()),
        classes=probabilities.shape[1],
        top3=100.0 * counts.topk(min(MOST_FREQUENT, len(counts))).values.sum().item() / len(probabilities),
        confidence=confidence.double().mean().item(),
        label_agreement=None if labels is None else 100.0 * (predicted == labels).double().mean().item(),
    )


def _coverage(network: Network, images: Tensor, real: Tensor, plan: Plan) -> RangeCoverage:
    width = parse_bits("W8A8")
    network = transformed(network, plan, width)
    sites = activation_sites(network.graph.graph, plan, width)  # which tensors these are is the same for all bits
    nodes = list(dict.fromkeys(site.root for site in sites))
    if not nodes:
        raise DataError(f"plan {plan.name!r} quantizes no activation of {network.source.text}, so no range can be compared")
    dreamt, wanted = _widths(network, images, nodes), _widths(network, real, nodes)
    found = [SiteCoverage(node.name, a / b) for node, a, b in zip(nodes, dreamt, wanted, strict=True) if b > 0]
    if not found:
        raise DataError(f"all {len(nodes)} activations that plan {plan.name!r} quantizes are constant on the real images")
    ratios = [site.ratio for site in found]
    return RangeCoverage(
        plan=plan.name,
        real_images=len(real),
        mean=sum(ratios) / len(ratios),
        worst=min(ratios, key=lambda ratio: min(ratio, 1 / ratio) if ratio else 0.0),
        sites=found,
    )


def _widths(network: Network, images: Tensor, nodes: list[fx.Node]) -> list[float]:
    """Largest minus smallest value of each tensor over all images."""
    run = watch(network, nodes)
    lows, highs = [], []
    with torch.no_grad():
        for piece in Pieces(images, at_once(network, CHUNK, kept=True)):
            values = run(piece)[1]
            lows.append(torch.stack([value.amin() for value in values]))
            highs.append(torch.stack([value.amax() for value in values]))
    widths: list[float] = (torch.stack(highs).amax(0) - torch.stack(lows).amin(0)).tolist()
    return widths
