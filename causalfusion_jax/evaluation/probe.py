"""Classifiers of features whose network stays as it is: linear, and nearest neighbours."""

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
"""Accuracy among the best so many classes is reported where there are more."""
NEIGHBOUR_CHUNK, QUERY_CHUNK = 65_536, 1024
"""Features whose similarities are in memory at once."""


def top_accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1`, and `top5` where there are more classes.

    Args:
      scores: [num, classes], higher is likelier.
      labels: int [num].
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # Ties count against the label, so that a classifier that knows nothing has no luck; NaN too.
    better = (~(scores < own)).sum(axis=1) - 1
    tops = [1] + [TOP] * (scores.shape[1] > TOP)
    return {f"top{k}": float(np.mean(better < k)) for k in tops}


class Standard(NamedTuple):
    """Batch normalization without scale and shift, of the whole training set.

    Attributes:
      mean, std: float32 [dim].
    """

    mean: np.ndarray
    std: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Standard":
        """That of features [num, dim]."""
        return Standard(features.mean(axis=0), np.sqrt(features.var(axis=0) + 1e-6))

    def __call__(self, features):
        return (features - self.mean) / self.std


# --- Linear -----------------------------------------------------------------------


def make_linear_optimizer(settings: ProbeConfig, epoch_steps: int) -> optax.GradientTransformation:
    """AdamW or LARS with warm-up and cosine; weight decay spares the bias."""
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
    """Without what does not say how to learn, which would compile the same program again."""
    learned = ("optimizer", "epochs", "learning_rate", "weight_decay", "warmup_epochs")
    return ProbeConfig(**{name: getattr(settings, name) for name in learned})


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _linear_step(settings: ProbeConfig, epoch_steps: int, classifier, opt_state, standard, features, labels):
    """One step on a minibatch: features [batch, dim], labels [batch]."""

    def loss(classifier):
        logits = _logits(classifier, standard(features))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    grads = jax.grad(loss)(classifier)
    updates, opt_state = make_linear_optimizer(settings, epoch_steps).update(grads, opt_state, classifier)
    return optax.apply_updates(classifier, updates), opt_state


def lower_linear_step(settings: ProbeConfig, dim: int, num_classes: int, device: jax.Device) -> jax.stages.Lowered:
    """The step of `fit_linear` on features [num, dim], traced for a device; at most `batch_size` of them."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    steps, batch = 1000, settings.batch_size
    static = _static(settings)
    weights = {"kernel": place((dim, num_classes), jnp.float32), "bias": place((num_classes,), jnp.float32)}
    opt_state = jax.tree.map(
        lambda leaf: place(leaf.shape, leaf.dtype), jax.eval_shape(make_linear_optimizer(static, steps).init, weights)
    )
    standard = Standard(place((dim,), jnp.float32), place((dim,), jnp.float32))
    features, labels = place((batch, dim), jnp.float32), place((batch,), jnp.int32)
    return _linear_step.lower(static, steps, weights, opt_state, standard, features, labels)


class LinearClassifier(NamedTuple):
    """A linear classifier of standardised features.

    Attributes:
      standard: the features' mean and standard deviation in training.
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
      settings: optimizer, epochs, and the rest of `ProbeConfig` that says how.
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
    opt_state = make_linear_optimizer(static, epoch_steps).init(weights)
    standard = Standard.of(features)
    on_device = jax.device_put(standard)
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(num)
        for step in range(epoch_steps):
            part = order[step * batch : (step + 1) * batch]
            weights, opt_state = _linear_step(
                static, epoch_steps, weights, opt_state, on_device, features[part], labels[part]
            )
    return LinearClassifier(standard, weights)


# --- Nearest neighbours -----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _nearer(k: int, queries, known, known_labels, similarity, labels):
    """The k most similar of those found so far and of `known`.

    Args:
      k: how many.
      queries, known: normalized features [queries, dim] and [n, dim].
      known_labels: int [n].
      similarity, labels: found so far, [queries, k].

    Returns:
      similarity and labels, [queries, k], most similar first.
    """
    products = jnp.matmul(queries, known.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.concatenate([similarity, products], axis=1)
    labels = jnp.concatenate([labels, jnp.broadcast_to(known_labels, products.shape)], axis=1)
    similarity, found = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(labels, found, axis=1)


def lower_nearer(settings: ProbeConfig, dim: int, device: jax.Device) -> jax.stages.Lowered:
    """The program of `vote` for whole chunks of features [..., dim], traced for a device."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    found = (QUERY_CHUNK, settings.neighbours)
    return _nearer.lower(
        settings.neighbours,
        place((QUERY_CHUNK, dim), jnp.float32),
        place((NEIGHBOUR_CHUNK, dim), jnp.float32),
        place((NEIGHBOUR_CHUNK,), jnp.int32),
        place(found, jnp.float32),
        place(found, jnp.int32),
    )


def normalized(features: np.ndarray) -> np.ndarray:
    """Features [num, dim] of length one."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def vote(
    settings: ProbeConfig, known: np.ndarray, known_labels: np.ndarray, queries: np.ndarray, num_classes: int
) -> np.ndarray:
    """Weighted votes of the nearest neighbours (as DINO, Caron et al. 2021, evaluates).

    Args:
      settings: `neighbours` k, and `temperature` T.
      known: features [num, dim] with labels int [num].
      queries: features [queries, dim].
      num_classes: classes.

    Returns:
      For every class the sum of exp(cosine similarity / T) over those of the k most similar
      known ones that are of it, divided by that of all k; float64 [queries, num_classes].

    Raises:
      InputError: fewer than k are known.
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
        best = [_nearer(k, part, chunk, labels, *found) for (part, _), found in zip(parts, best, strict=True)]
    similarity, labels = (np.concatenate(found) for found in zip(*jax.device_get(best), strict=True))
    weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / settings.temperature)
    votes = np.zeros((len(queries), num_classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels), weights)
    return votes / weights.sum(axis=1, keepdims=True)


# --- Both -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classified:
    """Features of one layer, to train on and to test on.

    Attributes:
      features, labels: float32 [num, dim] and int32 [num].
      held_out, held_out_labels: likewise.
      num_classes: classes.
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
        # Means over tokens have much in common, which would be most of a cosine.
        standard = Standard.of(self.features)
        votes = vote(settings, standard(self.features), self.labels, standard(self.held_out), self.num_classes)
        return top_accuracies(votes, self.held_out_labels)
