"""Searches the largest batch that fits a slice, and the cheapest change of settings with which a job fits.

Compilations are exact but slow, so predictions choose what to compile. Memory grows linearly with
the number of images on a device: two compilations predict the largest batch, a third one checks it.
A compilation that runs out of memory is fast, so batches beyond the limit are cheap to try. The
memory of changed settings is predicted from shapes, scaled by the memory of the failed job.
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
from causalfusion_jax.config.slices import SliceJob, check
from causalfusion_jax.config.training import ObjectiveConfig
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.training.draws import batch_key, example_keys
from causalfusion_jax.training.objective import training_loss
from causalfusion_jax.training.state import abstract_state

Compile = Callable[[SliceJob], Compiled]


class Clock:
    """The time budget of a search.

    Args:
      seconds: the budget, from now on.
      now: returns the time in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._end = now, now() + seconds

    def allows(self, seconds: float) -> bool:
        """Whether `seconds` are left."""
        return self._now() + seconds <= self._end


# --- The largest batch ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """Result of the search.

    Attributes:
      batch: the largest batch that compiled, over all devices; 0: none did.
      per_device: its images on each device.
      predicted: the largest batch by the linear fit of memory, or None.
      exact: the next larger batch does not fit.
    """

    batch: int
    per_device: int
    predicted: int | None
    exact: bool


def find_largest_batch(job: SliceJob, first: Compiled, compile_program: Compile, clock: Clock) -> LargestBatch:
    """Searches the largest batch of a job, in multiples of `job.quantum`.

    Args:
      job: the job.
      first: the compiler's result for it.
      compile_program: compiles another job.
      clock: the time budget.
    """
    known = {job.batch // job.quantum: first}
    while (n := _next_batch(known)) is not None:
        if not clock.allows(_expected_seconds(known, n)):
            break
        known[n] = compile_program(job.with_batch(n * job.quantum))
    fits, fails = _bracket(known)
    predicted = _predict(known)
    return LargestBatch(
        batch=fits * job.quantum,
        per_device=fits * job.quantum // job.batch_devices,
        predicted=None if predicted is None else predicted * job.quantum,
        exact=fails == fits + 1,
    )


def _bracket(known: dict[int, Compiled]) -> tuple[int, float]:
    """The largest size that fits (0: none), and the smallest one above that does not."""
    fits = max((n for n, compiled in known.items() if compiled.fits), default=0)
    fails = min((n for n, compiled in known.items() if not compiled.fits and n > fits), default=math.inf)
    return fits, fails


def _predict(known: dict[int, Compiled]) -> int | None:
    """The largest size within the limit, on the line through the two sizes nearest to the limit."""
    if len(known) < 2:
        return None
    nearest = sorted(known, key=lambda n: abs(known[n].total_bytes - known[n].limit_bytes))[:2]
    low, high = sorted(nearest)
    slope = (known[high].total_bytes - known[low].total_bytes) / (high - low)
    if slope <= 0:
        return None
    return max(math.floor(low + (known[low].limit_bytes - known[low].total_bytes) / slope), 0)


def _next_batch(known: dict[int, Compiled]) -> int | None:
    """The size to compile next; None if the largest size is known."""
    fits, fails = _bracket(known)
    if fails == fits + 1:
        return None
    if len(known) == 1:
        ((n, only),) = known.items()
        if not only.fits:
            return 2 * n
        # Beyond the limit, where a compilation fails fast.
        fixed = only.memory.arguments
        varying = max(only.total_bytes - fixed, 1) / n
        return max(n + 1, math.ceil((1.3 * only.limit_bytes - fixed) / varying))
    predicted = _predict(known)
    if predicted is None:
        predicted = 2 * fits
    return int(min(max(predicted, fits + 1), fails - 1))


def _expected_seconds(known: dict[int, Compiled], n: int) -> float:
    """Expected time of a compilation."""
    predicted = _predict(known)
    quick = [c.seconds for c in known.values() if not c.fits]
    slow = [c.seconds for c in known.values() if c.fits]
    if predicted is not None and n > predicted or len(known) == 1:
        return max(quick, default=0.5 * max(slow, default=0.0))
    return max(slow, default=3.0 * max(quick, default=0.0))


# --- The cheapest change ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """Changed settings of a job.

    Attributes:
      flags: flags to add to the command line.
      job: the job with the changed settings.
      predicted_bytes: predicted HBM.
      compiled: the compiler's result; None: not compiled.
    """

    flags: tuple[str, ...]
    job: SliceJob
    predicted_bytes: int = 0
    compiled: Compiled | None = None


def changes(job: SliceJob) -> Iterator[Change]:
    """Changes that save memory, the cheapest first.

    First single changes: remat of all but the matrix products, of everything, gradient accumulation,
    parameters split over the mesh. Then combinations of them, and last smaller batches.
    """
    if job.kind == "sample":
        yield from _smaller_batches(job, ())
        return
    remats = [r for r in ("dots", "full") if r != job.config.model.remat and job.config.model.remat != "full"]
    accums = list(_accumulations(job))
    split = [] if job.config.mesh.sizes["data"] == 1 else ["fsdp"]
    alone = [dict(remat=remat) for remat in remats] + [dict(accum=accum) for accum in accums]
    together = [dict(remat=remat, accum=accum) for remat in remats for accum in accums]
    candidates = [(None, change) for change in alone] + [(preset, {}) for preset in split]
    candidates += [(None, change) for change in together]
    candidates += [(preset, change) for preset in split for change in alone + together]
    for preset, change in candidates:
        yield _change(job, preset, **change)
    yield from _smaller_batches(job, ())
    strongest = _change(job, preset=split[0] if split else None, remat=remats[-1] if remats else None)
    if strongest.flags:
        yield from _smaller_batches(strongest.job, strongest.flags)


def _accumulations(job: SliceJob) -> Iterator[int]:
    """Gradient accumulation steps, doubled while each device has an image of every part."""
    accum, images = 2 * job.config.train.grad_accum_steps, job.batch // job.batch_devices
    while accum <= images and images % accum == 0:
        yield accum
        accum *= 2


def _smaller_batches(job: SliceJob, flags: tuple[str, ...]) -> Iterator[Change]:
    """The batch halved repeatedly."""
    n = job.batch // job.quantum // 2
    while n:
        batch = n * job.quantum
        name = "--num" if job.kind == "sample" else "--config.train.batch_size"
        yield Change((*flags, f"{name}={batch}"), job.with_batch(batch))
        n //= 2


def _change(job: SliceJob, preset=None, remat=None, accum=None) -> Change:
    flags = []
    if remat is not None:
        flags.append(f"--config.model.remat={remat}")
        job = job.with_settings("model", remat=remat)
    if accum is not None:
        flags.append(f"--config.train.grad_accum_steps={accum}")
        job = job.with_settings("train", grad_accum_steps=accum)
    if preset is not None:
        old = job.config.mesh
        kept = {name: old.sizes[name] for name in ("tensor", "sequence") if old.sizes[name] != 1}
        mesh = MeshConfig(preset, **kept)
        names = [field.name for field in dataclasses.fields(mesh)]
        flags += [f"--config.mesh.{n}={getattr(mesh, n)}" for n in names if getattr(mesh, n) != getattr(old, n)]
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, mesh=mesh))
    return Change(tuple(flags), job)


def find_change(
    job: SliceJob,
    failed: Compiled,
    compile_program: Compile,
    clock: Clock,
    estimate: Callable[[SliceJob], tuple[float, float]] | None = None,
) -> Change | None:
    """The first of `changes` that is predicted to fit, and does.

    Args:
      job: a job that does not fit.
      failed: the compiler's result for it.
      compile_program: compiles another job.
      clock: the time budget; when it is spent, the next predicted change is returned without compiling it.
      estimate: estimates HBM of a job; default: `estimated_bytes`.

    Returns:
      The change; None if no change is predicted to fit.
    """
    estimate = estimate or estimated_bytes
    fixed, varying = estimate(job)
    scale = max((failed.total_bytes - fixed) / max(varying, 1.0), 0.5)
    quick = failed.seconds
    for change in changes(job):
        if not _possible(change.job):
            continue
        fixed, varying = estimate(change.job)
        predicted = int(fixed + scale * varying)
        if predicted > failed.limit_bytes:
            continue
        change = dataclasses.replace(change, predicted_bytes=predicted)
        if not clock.allows(3.0 * quick):
            return change
        compiled = compile_program(change.job)
        if compiled.fits:
            return dataclasses.replace(change, compiled=compiled)
        scale = max(scale, (compiled.total_bytes - fixed) / max(varying, 1.0))
    return None


def _possible(job: SliceJob) -> bool:
    try:
        check(job)
    except InputError:
        return False
    return True


def estimated_bytes(job: SliceJob) -> tuple[float, float]:
    """Estimates HBM of a device from shapes: (bytes independent of the batch size, bytes proportional to it).

    Training: state, gradients and parameters in the compute type; residuals of the forward pass for
    the backward pass, and those of one layer recomputed. Sampling: parameters; the KV cache.
    """
    model = job.config.transformer
    images = job.batch / job.batch_devices
    if job.kind == "sample":
        params = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(model)[1]))
        tokens = model.num_condition_tokens + model.num_tokens
        return float(params), float(4 * model.layers * tokens * model.hidden * images)
    state = abstract_state(job.config.step, job.mesh())
    params, total = (sum(map(_shard_bytes, jax.tree.leaves(tree))) for tree in (state.params, state))
    accum = job.config.train.grad_accum_steps
    fixed = total + params * (1.5 + (accum > 1))
    mesh = job.mesh()
    residuals = residual_bytes(job.config.step.objective)
    layer = residual_bytes(_without_remat(job.config.step.objective)) / model.layers
    return fixed, (residuals + layer) * images / accum / (mesh.shape["tensor"] * mesh.shape["sequence"])


def _shard_bytes(leaf) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _without_remat(objective: ObjectiveConfig) -> ObjectiveConfig:
    return dataclasses.replace(objective, model=dataclasses.replace(objective.model, remat="none"))


@functools.cache
def residual_bytes(objective: ObjectiveConfig) -> float:
    """Bytes that the forward pass of one image keeps for the backward pass, without parameters."""

    def batch_bytes(batch: int) -> int:
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
        residuals = jax.eval_shape(backward, abstract_model(objective.model)[1], data, key)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return float(batch_bytes(2) - batch_bytes(1))
