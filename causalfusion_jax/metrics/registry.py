"""The metrics of samples: what they mean, which direction is better, what they need, and how they are computed.

A metric of a network's features is declared in FEATURE_METRICS, with its function. A metric of
pixels is declared with the data source that measures it (`data.source.PixelScores`); those of
several sources are here. Definitions of the functions are in `metrics.distribution`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from causalfusion_jax.metrics.distribution import (
    FeatureStatistics,
    InceptionScore,
    KeptFeatures,
    frechet_from_statistics,
    kernel_inception_distance,
    precision_recall,
)

NUM_NEIGHBORS = 3
"""k of precision and recall."""
KID_SUBSET_SIZE = 1000

Accumulator = FeatureStatistics | InceptionScore | KeptFeatures


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a metric keeps of one feature of all samples.

    Attributes:
      feature: name of the feature, as the network returns it.
      dim: number of its values.
      make: from `dim` to an empty accumulator, with `update(features, numbers)`, `to_arrays()` and
        `merge_arrays(arrays)`.
    """

    feature: str
    dim: int
    make: Callable[[int], Accumulator]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of samples.

    Attributes:
      name: key in results, flags and settings.
      meaning: one line.
      higher_is_better: else lower is better.
      needs_classes: whether it compares samples with the classes they were sampled for.
      of_videos: whether it is of videos, which are not evaluated during training.
      network: the converted network that it needs, which is also the flag for its folder:
        "inception", "i3d", or "" for metrics of pixels.
      reference: what it compares with: "statistics" (mean and covariance, a Fréchet distance),
        "images", or "" for nothing.
      summary: of metrics of features: what is kept of the samples (and of the reference).
      compute: of metrics of features: (accumulator of the samples, that of the reference or None)
        -> the metric by name, and values beside it. It may return further metrics of the same
        accumulators.
      min_samples: fewest samples, and fewest reference images.
      published_samples: samples that published values are of; values of fewer are biased. 0: unbiased.
    """

    name: str
    meaning: str
    higher_is_better: bool = False
    needs_classes: bool = False
    of_videos: bool = False
    network: str = ""
    reference: str = ""
    summary: Summary | None = None
    compute: Callable[[Any, Any], dict[str, Any]] | None = None
    min_samples: int = 2
    published_samples: int = 0


POOLED_STATISTICS = Summary("2048", 2048, FeatureStatistics)
SPATIAL_STATISTICS = Summary("spatial", 7 * 17 * 17, FeatureStatistics)
I3D_STATISTICS = Summary("i3d_logits", 400, FeatureStatistics)
POOLED_FEATURES = Summary("2048", 2048, KeptFeatures)
CLASS_PROBABILITIES = Summary("logits_unbiased", 1008, lambda dim: InceptionScore())


def _frechet_metric(name: str, meaning: str, summary: Summary, published_samples: int, **needs) -> Metric:
    """A Fréchet distance of features; both sides have `mean` and `cov`."""
    return Metric(
        name,
        f"Fréchet distance {meaning}",
        reference="statistics",
        summary=summary,
        compute=lambda ours, real: {name: frechet_from_statistics(ours.mean, ours.cov, real.mean, real.cov)},
        published_samples=published_samples,
        **needs,
    )


def _inception_score(ours: InceptionScore, real: None) -> dict[str, float]:
    mean, std = ours.result()
    return {"inception_score": mean, "inception_score_std": std}


def _precision_recall(ours: KeptFeatures, real: KeptFeatures) -> dict[str, float]:
    values = precision_recall(real.features, ours.features, NUM_NEIGHBORS)
    return {name: values[name] for name in ("precision", "recall")}


def _kid(ours: KeptFeatures, real: KeptFeatures) -> dict[str, float]:
    ours, real = ours.features, real.features
    size = min(KID_SUBSET_SIZE, len(ours), len(real))
    mean, std = kernel_inception_distance(ours, real, subset_size=size)
    return {"kid": mean, "kid_std": std, "kid_subset_size": size}


_OF_IMAGES = {"network": "inception", "reference": "images", "summary": POOLED_FEATURES}
_MANIFOLDS = _OF_IMAGES | {
    "higher_is_better": True,
    "compute": _precision_recall,
    "min_samples": NUM_NEIGHBORS + 1,
    "published_samples": 50_000,
}
_ALL = (
    _frechet_metric(
        "fid", "of Inception's pooled features (arXiv 1706.08500)", POOLED_STATISTICS, 50_000, network="inception"
    ),
    _frechet_metric(
        "sfid", "of Inception's spatial features (arXiv 2103.03841)", SPATIAL_STATISTICS, 50_000, network="inception"
    ),
    Metric(
        "inception_score",
        "divergence of p(class | image) from p(class) (arXiv 1606.03498)",
        higher_is_better=True,
        network="inception",
        summary=CLASS_PROBABILITIES,
        compute=_inception_score,
        published_samples=50_000,
    ),
    Metric("precision", "share of samples in the manifold of the real images (arXiv 1904.06991)", **_MANIFOLDS),
    Metric("recall", "share of real images in the manifold of the samples (arXiv 1904.06991)", **_MANIFOLDS),
    Metric("kid", "kernel distance of Inception's pooled features (arXiv 1801.01401)", **_OF_IMAGES, compute=_kid),
    _frechet_metric(
        "fvd", "of I3D's logits of videos (arXiv 1812.01717)", I3D_STATISTICS, 2048, network="i3d", of_videos=True
    ),
)
FEATURE_METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

FD = Metric("fd", "Fréchet distance of pixels")
ACCURACY = Metric("accuracy", "share of samples read as the class asked for", higher_is_better=True, needs_classes=True)
