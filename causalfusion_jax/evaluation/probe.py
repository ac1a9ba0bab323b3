"""Classifiers of the features of a frozen network: a linear one, and nearest neighbours."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from causalfusion_jax.common.errors import require
from causalfusion_jax.config.probe import ProbeConfig
from causalfusion_jax.config.training import OptimizerConfig
from causalfusion_jax.training.optimizer import learning_rate_schedule

TOP = 5
"""k of the second top-k accuracy, which is reported if there are more classes."""
NEIGHBOUR_CHUNK, QUERY_CHUNK = 65_536, 1024
"""Training features and queries whose similarities are in memory at once."""


def top_accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1`, and `top5` where there are more classes.

    Args:
      scores: [num, classes], higher for a more likely class.
      labels: int [num].
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # Ties, and NaN, count as errors.
    better = (~(scores < own)).sum(axis=1) - 1
    tops = [1] + [TOP] * (scores.shape[1] > TOP)
    return {f"top{k}": float(np.mean(better < k)) for k in tops}


class Standard(NamedTuple):
    """Standardisation by the mean and standard deviation of a training set.

    Attributes:
      mean, std: float32 [dim].
    """

    mean: np.ndarray
    std: np.ndarray

    @staticmethod
    def fit(features: np.ndarray) -> "Standard":
        """The standardisation of training features [num, dim]."""
        return Standard(features.mean(axis=0), np.sqrt(features.var(axis=0) + 1e-6))

    def __call__(self, features):
        return (features - self.mean) / self.std


# --- Linear -----------------------------------------------------------------------


def make_linear_optimizer(settings: ProbeConfig, epoch_steps: int) -> optax.GradientTransformation:
    """AdamW or LARS with warm-up and cosine schedule; no weight decay of the bias."""
    warmup = round(settings.warmup_epochs * epoch_steps)
    rate = OptimizerConfig(learning_rate=settings.learning_rate, schedule="cosine", warmup_steps=warmup)
    schedule = learning_rate_schedule(rate, settings.epochs * epoch_steps)
    matrices = {"kernel": True, "bias": False}
    if settings.optimizer == "lars":
        return optax.lars(
            schedule, weight_decay=settings.weight_decay, weight_decay_mask=matrices, trust_ratio_mask=matrices
        )
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=matrices)


def _logits(classifier, features):
    return features @ classifier["kernel"] + classifier["bias"]


def _static(settings: ProbeConfig) -> ProbeConfig:
    """Only the settings of the optimizer, so that others do not compile the same program again."""
    names = ("optimizer", "epochs", "learning_rate", "weight_decay", "warmup_epochs")
    return ProbeConfig(**{name: getattr(settings, name) for name in names})


class _LinearState(NamedTuple):
    """Weights of the linear classifier, and the state of their optimizer."""

    weights: dict[str, jax.Array]
    opt_state: optax.OptState


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _linear_step(settings: ProbeConfig, epoch_steps: int, state: _LinearState, standard, features, labels):
    """One step on a minibatch: features [batch, dim], labels [batch]."""

    def loss(weights):
        logits = _logits(weights, standard(features))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    weights, opt_state = state
    updates, opt_state = make_linear_optimizer(settings, epoch_steps).update(
        jax.grad(loss)(weights), opt_state, weights
    )
    return _LinearState(optax.apply_updates(weights, updates), opt_state)


def lower_linear_step(settings: ProbeConfig, dim: int, num_classes: int, device: jax.Device) -> jax.stages.Lowered:
    """Traces the step of `fit_linear` on features [batch_size, dim] for a device."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    steps, batch = 1000, settings.batch_size
    static = _static(settings)
    weights = {"kernel": place((dim, num_classes), jnp.float32), "bias": place((num_classes,), jnp.float32)}
    opt_state = jax.tree.map(
        lambda leaf: place(leaf.shape, leaf.dtype), jax.eval_shape(make_linear_optimizer(static, steps).init, weights)
    )
    standard = Standard(place((dim,), jnp.float32), place((dim,), jnp.float32))
    features, labels = place((batch, dim), jnp.float32), place((batch,), jnp.int32)
    return _linear_step.lower(static, steps, _LinearState(weights, opt_state), standard, features, labels)


class LinearClassifier(NamedTuple):
    """A linear classifier of standardised features.

    Attributes:
      standard: standardisation of the features, from the training set.
      weights: `kernel` [dim, classes] and `bias` [classes].
    """

    standard: Standard
    weights: dict[str, jax.Array]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits of features [num, dim]; [num, classes]."""
        weights = jax.device_get(self.weights)
        return _logits(weights, self.standard(features))


def fit_linear(settings: ProbeConfig, features: np.ndarray, labels: np.ndarray, num_classes: int) -> LinearClassifier:
    """Softmax regression by minibatches, on one device.

    Args:
      settings: optimizer, epochs, batch size and seed are used.
      features: float32 [num, dim]; they stay in the host's memory.
      labels: int [num].
      num_classes: classes.
    """
    num, dim = features.shape
    batch = min(settings.batch_size, num)
    epoch_steps = num // batch
    static = _static(settings)
    kernel = 0.01 * jax.random.truncated_normal(jax.random.key(settings.seed), -2.0, 2.0, (dim, num_classes))
    weights = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
    state = _LinearState(weights, make_linear_optimizer(static, epoch_steps).init(weights))
    standard = Standard.fit(features)
    on_device = jax.device_put(standard)
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(num)
        for step in range(epoch_steps):
            part = order[step * batch : (step + 1) * batch]
            state = _linear_step(static, epoch_steps, state, on_device, features[part], labels[part])
    return LinearClassifier(standard, state.weights)


# --- Nearest neighbours -----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _nearer(k: int, queries, known, known_labels, similarity, labels):
    """Merges the k nearest neighbours so far with those among `known`.

    Args:
      k: number of neighbours.
      queries, known: normalized features [queries, dim] and [n, dim].
      known_labels: int [n].
      similarity, labels: of the nearest neighbours so far, [queries, k].

    Returns:
      similarity and labels, [queries, k], most similar first.
    """
    products = jnp.matmul(queries, known.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.concatenate([similarity, products], axis=1)
    labels = jnp.concatenate([labels, jnp.broadcast_to(known_labels, products.shape)], axis=1)
    similarity, nearest = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(labels, nearest, axis=1)


def lower_nearer(settings: ProbeConfig, dim: int, device: jax.Device) -> jax.stages.Lowered:
    """Traces the program of `vote` for full chunks of features [..., dim] for a device."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    neighbours = (QUERY_CHUNK, settings.neighbours)
    return _nearer.lower(
        settings.neighbours,
        place((QUERY_CHUNK, dim), jnp.float32),
        place((NEIGHBOUR_CHUNK, dim), jnp.float32),
        place((NEIGHBOUR_CHUNK,), jnp.int32),
        place(neighbours, jnp.float32),
        place(neighbours, jnp.int32),
    )


def normalized(features: np.ndarray) -> np.ndarray:
    """Features [num, dim] of length one."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def vote(
    settings: ProbeConfig, known: np.ndarray, known_labels: np.ndarray, queries: np.ndarray, num_classes: int
) -> np.ndarray:
    """Weighted votes of the nearest neighbours, as in the evaluation of DINO (Caron et al. 2021).

    Args:
      settings: `neighbours` k, and `temperature` T.
      known: features [num, dim] with labels int [num].
      queries: features [queries, dim].
      num_classes: classes.

    Returns:
      Of the k most similar known features, the sum of exp(cosine similarity / T) over those of
      each class, divided by the sum over all k; float64 [queries, num_classes].

    Raises:
      InputError: there are fewer than k known features.
    """
    k = settings.neighbours
    require(k <= len(known), "config.probe.neighbours", k, f"must be <= {len(known)}, the training images")
    known = normalized(known)
    parts = [
        (jax.device_put(normalized(queries[start : start + QUERY_CHUNK])), start)
        for start in range(0, len(queries), QUERY_CHUNK)
    ]
    best = [(jnp.full((len(part), k), -jnp.inf), jnp.zeros((len(part), k), jnp.int32)) for part, _ in parts]
    for start in range(0, len(known), NEIGHBOUR_CHUNK):
        chunk, labels = (jax.device_put(a[start : start + NEIGHBOUR_CHUNK]) for a in (known, known_labels))
        best = [_nearer(k, part, chunk, labels, *nearest) for (part, _), nearest in zip(parts, best, strict=True)]
    similarity, labels = (np.concatenate(chunks) for chunks in zip(*jax.device_get(best), strict=True))
    weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / settings.temperature)
    votes = np.zeros((len(queries), num_classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels), weights)
    return votes / weights.sum(axis=1, keepdims=True)


# --- Accuracies -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classified:
    """Labelled features of one layer.

    Attributes:
      features, labels: of the training images, float32 [num, dim] and int32 [num].
      held_out, held_out_labels: of the held-out images, likewise.
      num_classes: number of classes.
    """

    features: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    num_classes: int

    def linear(self, settings: ProbeConfig) -> dict[str, float]:
        """Accuracies of a linear classifier on the held-out images."""
        classify = fit_linear(settings, self.features, self.labels, self.num_classes)
        return top_accuracies(classify(self.held_out), self.held_out_labels)

    def knn(self, settings: ProbeConfig) -> dict[str, float]:
        """Accuracies of the nearest neighbours' votes."""
        # The common part of the means over tokens would dominate their cosine similarity.
        standard = Standard.fit(self.features)
        votes = vote(settings, standard(self.features), self.labels, standard(self.held_out), self.num_classes)
        return top_accuracies(votes, self.held_out_labels)
