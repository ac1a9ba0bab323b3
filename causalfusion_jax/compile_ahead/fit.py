"""Finds the largest batch that fits a slice, and the cheapest change for a program that does not.

Compiling is the slow part, and tells the truth; predictions decide what is worth compiling.
Memory grows linearly with the images on a device: two compilations tell where it meets the
limit, a third checks. One that runs out of memory is quick, so points beyond the limit are
cheap. A change of settings is predicted from shapes, scaled by what was measured.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator

import jax

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.sharding import MeshConfig
from causalfusion_jax.compile_ahead.compiler import Compiled
from causalfusion_jax.config.slices import Spec, check
from causalfusion_jax.config.training import ObjectiveConfig
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.draws import batch_key, example_keys
from causalfusion_jax.training.objective import training_loss
from causalfusion_jax.training.state import abstract_state

Compile = Callable[[Spec], Compiled]


class Clock:
    """A time budget that compilations are chosen by.

    Args:
      seconds: in all, from now.
      now: the time, in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._end = now, now() + seconds

    def allows(self, seconds: float) -> bool:
        """Whether so many are left."""
        return self._now() + seconds <= self._end


# --- The largest batch ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """What is known of the batches that fit.

    Attributes:
      batch: the largest that compiled, over all devices; 0: none did.
      per_device: its images on each device.
      predicted: the largest by the fit of memory, or None.
      exact: the next larger one does not compile.
    """

    batch: int
    per_device: int
    predicted: int | None
    exact: bool


def find_largest_batch(spec: Spec, first: Compiled, compile_program: Compile, clock: Clock) -> LargestBatch:
    """Searches the largest batch of a program, in multiples of what the mesh splits.

    Args:
      spec: the program.
      first: what came of it, as it is.
      compile_program: compiles another.
      clock: when to stop.
    """
    known = {spec.batch // spec.quantum: first}
    while (n := _next_batch(known)) is not None:
        if not clock.allows(_expected_seconds(known, n)):
            break
        known[n] = compile_program(spec.with_batch(n * spec.quantum))
    fits, fails = _bracket(known)
    predicted = _predict(known)
    return LargestBatch(
        batch=fits * spec.quantum,
        per_device=fits * spec.quantum // spec.batch_devices,
        predicted=None if predicted is None else predicted * spec.quantum,
        exact=fails == fits + 1,
    )


def _bracket(known: dict[int, Compiled]) -> tuple[int, float]:
    """The largest size that fits (0: none), and the smallest that does not."""
    fits = max((n for n, compiled in known.items() if compiled.fits), default=0)
    fails = min((n for n, compiled in known.items() if not compiled.fits and n > fits), default=math.inf)
    return fits, fails


def _predict(known: dict[int, Compiled]) -> int | None:
    """Where memory meets the limit, on the line through the two points nearest to it."""
    if len(known) < 2:
        return None
    nearest = sorted(known, key=lambda n: abs(known[n].total_bytes - known[n].limit_bytes))[:2]
    low, high = sorted(nearest)
    slope = (known[high].total_bytes - known[low].total_bytes) / (high - low)
    if slope <= 0:
        return None
    return max(math.floor(low + (known[low].limit_bytes - known[low].total_bytes) / slope), 0)


def _next_batch(known: dict[int, Compiled]) -> int | None:
    """The size to compile next; None where the answer is known."""
    fits, fails = _bracket(known)
    if fails == fits + 1:
        return None
    if len(known) == 1:
        ((n, only),) = known.items()
        if not only.fits:
            return 2 * n
        # Beyond the limit, where failing is quick.
        fixed = only.memory.arguments
        each = max(only.total_bytes - fixed, 1) / n
        return max(n + 1, math.ceil((1.3 * only.limit_bytes - fixed) / each))
    predicted = _predict(known)
    if predicted is None:
        predicted = 2 * fits
    return int(min(max(predicted, fits + 1), fails - 1))


def _expected_seconds(known: dict[int, Compiled], n: int) -> float:
    """How long a compilation is likely to take."""
    predicted = _predict(known)
    quick = [c.seconds for c in known.values() if not c.fits]
    slow = [c.seconds for c in known.values() if c.fits]
    if predicted is not None and n > predicted or len(known) == 1:
        return max(quick, default=0.5 * max(slow, default=0.0))
    return max(slow, default=3.0 * max(quick, default=0.0))


# --- The cheapest change ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """Other settings for a program.

    Attributes:
      flags: what to add to the command line.
      spec: the program with them.
      predicted_bytes: HBM it is predicted to need.
      compiled: what came of compiling it; None: not tried.
    """

    flags: tuple[str, ...]
    spec: Spec
    predicted_bytes: int = 0
    compiled: Compiled | None = None


def changes(spec: Spec) -> Iterator[Change]:
    """Settings that save memory, the cheapest first.

    First one at a time: remat of all but the matrix products, of everything, the batch in
    parts, parameters split over the mesh. Then together; then a smaller batch too.
    """
    if spec.job == "sample":
        yield from _smaller_batches(spec, ())
        return
    remats = [r for r in ("dots", "full") if r != spec.config.model.remat and spec.config.model.remat != "full"]
    accums = list(_accumulations(spec))
    split = [] if spec.config.mesh.sizes["data"] == 1 else ["fsdp"]
    alone = [dict(remat=remat) for remat in remats] + [dict(accum=accum) for accum in accums]
    together = [dict(remat=remat, accum=accum) for remat in remats for accum in accums]
    tried = [(None, change) for change in alone] + [(preset, {}) for preset in split]
    tried += [(None, change) for change in together]
    tried += [(preset, change) for preset in split for change in alone + together]
    for preset, change in tried:
        yield _change(spec, preset, **change)
    yield from _smaller_batches(spec, ())
    strongest = _change(spec, preset=split[0] if split else None, remat=remats[-1] if remats else None)
    if strongest.flags:
        yield from _smaller_batches(strongest.spec, strongest.flags)


def _accumulations(spec: Spec) -> Iterator[int]:
    """Powers of two times the parts of a batch, while each device has an image of every part."""
    accum, images = 2 * spec.config.train.grad_accum_steps, spec.batch // spec.batch_devices
    while accum <= images and images % accum == 0:
        yield accum
        accum *= 2


def _smaller_batches(spec: Spec, flags: tuple[str, ...]) -> Iterator[Change]:
    """The batch halved, and again."""
    n = spec.batch // spec.quantum // 2
    while n:
        batch = n * spec.quantum
        name = "--num" if spec.job == "sample" else "--config.train.batch_size"
        yield Change((*flags, f"{name}={batch}"), spec.with_batch(batch))
        n //= 2


def _change(spec: Spec, preset=None, remat=None, accum=None) -> Change:
    flags = []
    if remat is not None:
        flags.append(f"--config.model.remat={remat}")
        spec = spec.with_settings("model", remat=remat)
    if accum is not None:
        flags.append(f"--config.train.grad_accum_steps={accum}")
        spec = spec.with_settings("train", grad_accum_steps=accum)
    if preset is not None:
        old = spec.config.mesh
        kept = {name: old.sizes[name] for name in ("tensor", "sequence") if old.sizes[name] != 1}
        mesh = MeshConfig(preset, **kept)
        names = [field.name for field in dataclasses.fields(mesh)]
        flags += [f"--config.mesh.{n}={getattr(mesh, n)}" for n in names if getattr(mesh, n) != getattr(old, n)]
        spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, mesh=mesh))
    return Change(tuple(flags), spec)


def find_change(
    spec: Spec,
    failed: Compiled,
    compile_program: Compile,
    clock: Clock,
    estimate: Callable[[Spec], tuple[float, float]] | None = None,
) -> Change | None:
    """The first of `changes` that is predicted to fit and compiles.

    Args:
      spec: a program that does not fit.
      failed: what came of it.
      compile_program: compiles another.
      clock: when to stop compiling; the change is then the predicted one.
      estimate: bytes (that do not depend on the images, that do); default: from shapes.

    Returns:
      The change; None where nothing is predicted to fit.
    """
    estimate = estimate or estimated_bytes
    fixed, varying = estimate(spec)
    scale = max((failed.total_bytes - fixed) / max(varying, 1.0), 0.5)
    quick = failed.seconds
    for change in changes(spec):
        if not _possible(change.spec):
            continue
        fixed, varying = estimate(change.spec)
        predicted = int(fixed + scale * varying)
        if predicted > failed.limit_bytes:
            continue
        change = dataclasses.replace(change, predicted_bytes=predicted)
        if not clock.allows(3.0 * quick):
            return change
        compiled = compile_program(change.spec)
        if compiled.fits:
            return dataclasses.replace(change, compiled=compiled)
        scale = max(scale, (compiled.total_bytes - fixed) / max(varying, 1.0))
    return None


def _possible(spec: Spec) -> bool:
    try:
        check(spec)
    except InputError:
        return False
    return True


def estimated_bytes(spec: Spec) -> tuple[float, float]:
    """HBM of a device from shapes: (what does not depend on the images, what does).

    Training: state, gradients and parameters in the compute type; then what the forward
    pass keeps for the backward pass, and one layer's worth beside it. Sampling: parameters;
    the cache of keys and values.
    """
    model = spec.config.transformer
    images = spec.batch / spec.batch_devices
    if spec.job == "sample":
        params = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(model)[1]))
        tokens = model.num_condition_tokens + model.num_tokens
        return float(params), float(4 * model.layers * tokens * model.hidden * images)
    state = abstract_state(spec.config.step, spec.mesh())
    params, total = (sum(map(_shard_bytes, jax.tree.leaves(tree))) for tree in (state.params, state))
    accum = spec.config.train.grad_accum_steps
    fixed = total + params * (1.5 + (accum > 1))
    mesh = spec.mesh()
    kept = kept_bytes(spec.config.step.objective)
    layer = kept_bytes(_without_remat(spec.config.step.objective)) / model.layers
    return fixed, (kept + layer) * images / accum / (mesh.shape["tensor"] * mesh.shape["sequence"])


def _shard_bytes(leaf) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _without_remat(objective: ObjectiveConfig) -> ObjectiveConfig:
    return dataclasses.replace(objective, model=dataclasses.replace(objective.model, remat="none"))


@functools.cache
def kept_bytes(objective: ObjectiveConfig) -> float:
    """What the forward pass of one image keeps for the backward pass, parameters left out."""

    def of(batch: int) -> int:
        *frames, height, width = objective.model.grid
        size = (height * objective.patch_size, width * objective.patch_size)
        channels = objective.model.token_dim // objective.patch_size**2
        image = jax.ShapeDtypeStruct((batch, *frames, *size, channels), "float32")
        data = {"image": image, "label": jax.ShapeDtypeStruct((batch,), "int32")}
        if objective.joint is not None:
            data["text"] = jax.ShapeDtypeStruct((batch, objective.model.text_tokens), "int32")

        def backward(params, data, key):
            keys = example_keys(key, batch)
            loss = functools.partial(training_loss, objective)
            return jax.vjp(lambda p: loss(p, data, keys, batch_key(key))[0], params)[1]

        key = jax.eval_shape(lambda: jax.random.key(0))
        kept = jax.eval_shape(backward, abstract_model(objective.model)[1], data, key)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    return float(of(2) - of(1))
