"""The KV-cached sampler: every order, every number of AR steps, every solver, one jitted program.

Condition (and known clean) tokens are prefilled into the cache. Each AR step then
starts from fresh noise for its own tokens only, runs the whole noise schedule for them
against the frozen cache, and commits the clean result to the cache (CausalFusion
section 3.2). Where clean tokens do not depend on the class (adaLN on the noisy ones only),
their keys and values are computed and kept once for both halves of guidance. Both axes
are `lax.scan`s, so a program's size does not grow with either.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.sharding import partition
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core import factorization
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.diffusion import DiffusionConfig, to_x_0_and_eps
from causalfusion_jax.core.factorization import EMPTY_STEP, FactorizationConfig, Role
from causalfusion_jax.core.solvers import SolverTable, solver_table
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.flops import forward_flops
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.sequence import ImageTokens, Tokens, repeat_batch
from causalfusion_jax.models.transformer import abstract_model


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """The static arguments of sampling.

    Attributes:
      model, diffusion, factorization: settings that the parameters were trained with.
      sampler: how to sample.
    """

    model: TransformerConfig
    diffusion: DiffusionConfig
    factorization: FactorizationConfig
    sampler: SamplerConfig

    @property
    def solver_table(self) -> SolverTable:
        """The solver's coefficients. Raises InputError where it does not fit the noise schedule."""
        return solver_table(self.sampler, self.diffusion)

    def guidance_scales(self, sizes) -> np.ndarray:
        """Guidance weight of each AR step, of `sizes` tokens, and solver row; float32 [S, rows]."""
        return guidance_scales(self.sampler, self.solver_table.t, self.diffusion.num_timesteps, sizes)


class Given(NamedTuple):
    """What is known of a batch of images before they are generated; None: drawn, or nothing.

    Attributes:
      order: int32 [batch, L], token order; default: drawn as the sampler says.
      tokens: clean tokens [batch, K, token_dim] at the first K positions of `order`, which is
        then required; the remaining L - K are generated.
      step: int32 [K], AR steps of these tokens, non-decreasing from 0; default: all 0.
      x_T: initial noise at the other positions, [batch, L - K, token_dim]; default: drawn.
    """

    order: jax.Array | None = None
    tokens: jax.Array | None = None
    step: jax.Array | None = None
    x_T: jax.Array | None = None

    @property
    def num_known(self) -> int:
        """Number of known tokens, K."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def select(self, indices) -> "Given":
        """What is known of some examples; `indices` is int [num]."""
        picked = jax.tree.map(lambda leaf: leaf[indices], self._replace(step=None))
        return picked._replace(step=self.step)


NOTHING = Given()
"""Nothing is known."""


def guidance_scales(sampler: SamplerConfig, t: np.ndarray, num_timesteps: int, sizes) -> np.ndarray:
    """Guidance weight of every AR step and solver row; float32 [S, rows].

    Args:
      sampler: scale, schedule and interval.
      t: timesteps of the solver's rows.
      num_timesteps: T.
      sizes: tokens in each AR step.
    """
    generated = (np.cumsum(sizes) / np.sum(sizes))[:, None]
    denoised = 1.0 - t[None, :] / num_timesteps
    rise = {"constant": 1.0, "linear": denoised, "ar_linear": generated}[sampler.cfg_schedule]
    low, high = sampler.cfg_interval
    scales = np.where((low <= t) & (t < high), 1.0 + (sampler.cfg_scale - 1.0) * rise, 1.0)
    return np.broadcast_to(scales, (len(sizes), len(t))).astype(np.float32)


def sampling_flops(
    model: TransformerConfig, diffusion: DiffusionConfig, sampler: SamplerConfig, text_tokens: int = 0
) -> int:
    """Model FLOPs of generating one image, with a prompt of `text_tokens` slots.

    Prefill of the condition and the prompt, every solver row of every AR step against the cache
    at that time (twice where guided), and the commits of all AR steps but the last.
    """
    sizes = sampler.sizes(model.num_tokens)
    table = solver_table(sampler, diffusion)
    scales = guidance_scales(sampler, table.t, diffusion.num_timesteps, sizes)
    prefixes = 2 if (scales != 1.0).any() and (model.clean_depends_on_class or text_tokens) else 1
    seen = model.num_condition_tokens + text_tokens
    total = prefixes * forward_flops(model, seen, noise_levels=0) if seen else 0
    for index, size in enumerate(sizes):
        seen += size
        passes = int(np.where(scales[index] != 1.0, 2, 1).sum())
        total += passes * forward_flops(model, size, seen)
        if index < len(sizes) - 1:
            total += prefixes * forward_flops(model, size, seen, noise_levels=0)
    return total


def image_keys(seed: int, indices) -> jax.Array:
    """One PRNG key for each image number, so that an image does not depend on its batch."""
    key = jax.random.key(seed)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


class StepRows(NamedTuple):
    """AR steps as rows of one size, short ones padded, as `lax.scan` needs them.

    Attributes:
      sizes: int [S], tokens in each AR step.
      positions: int [S, size], their positions among the generated tokens.
      valid: bool [S, size], False for padding.
    """

    sizes: np.ndarray
    positions: np.ndarray
    valid: np.ndarray

    @property
    def slots(self) -> int:
        """Cache slots for the clean tokens of all steps but the last, whose clean tokens are unattended."""
        if len(self.sizes) == 1:
            return 0
        return int(self.sizes[:-2].sum()) + self.valid.shape[1]

    def gather(self, tokens):
        """[batch, n, ...] of all generated tokens to [S, batch, size, ...]."""
        return jnp.moveaxis(tokens[:, self.positions], 1, 0)


def step_rows(sizes) -> StepRows:
    """The rows of AR steps of `sizes` tokens."""
    size, starts = max(sizes), np.cumsum([0, *sizes[:-1]])
    positions = np.minimum(starts[:, None] + np.arange(size), sum(sizes) - 1)
    return StepRows(np.asarray(sizes), positions, np.arange(size) < np.asarray(sizes)[:, None])


def generate(spec: SamplingSpec, params, keys, condition: Condition, given: Given = NOTHING):
    """Generates images as tokens. Jit with `spec` static.

    Args:
      spec: the model, and how to sample from it.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one for each image (`image_keys`).
      condition: of the images; guidance contrasts it with no class and no text.
      given: what is known of the images.

    Returns:
      x_0, float32 [batch, L, token_dim] in raster order.

    Raises:
      InputError: the sampler does not fit the model.
    """
    rows = step_rows(spec.sampler.sizes(spec.model.num_tokens - given.num_known))
    scales = spec.guidance_scales(rows.sizes)
    order_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    order = _order(spec, given, order_keys)
    transformer = nnx.merge(abstract_model(spec.model)[0], params)
    # Guidance evaluates condition and no condition side by side, [2 * batch].
    guided, unguided = bool((scales != 1.0).any()), bool((scales == 1.0).any())
    condition = condition.with_unconditional(spec.model.num_classes) if guided else condition
    two_prefixes = guided and (spec.model.clean_depends_on_class or condition.num_steps > 0)
    prefix = Prefix(transformer, 2 if two_prefixes else 1)
    cache, first_step = _prefill(prefix, condition.select(slice(prefix.copies * len(keys))), given, order, rows.slots)

    def ar_step(cache, scanned):
        index, ids, valid, count, scales_row, x_T = scanned
        step = index + first_step
        denoise = Denoiser(transformer, cache, condition, ids, valid=valid, step=step, guided=guided, unguided=unguided)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, index)
        x_0 = solve(spec, denoise, scales_row, step_keys, x_T)

        def commit(cache):
            role = jnp.where(valid, Role.CLEAN, Role.PAD)
            return prefix.append_image(cache, ImageTokens(x_0, ids), role, step, count)

        if len(rows.sizes) > 1:
            with jax.named_scope("commit"):
                # The clean tokens of the last step are unattended.
                cache = jax.lax.cond(index < len(rows.sizes) - 1, commit, lambda cache: cache, cache)
        return cache, x_0

    scanned = (
        jnp.arange(len(rows.sizes)),
        rows.gather(order[:, given.num_known :]),
        jnp.asarray(rows.valid),
        jnp.asarray(rows.sizes),
        jnp.asarray(scales),
        None if given.x_T is None else rows.gather(given.x_T),
    )
    _, steps = jax.lax.scan(ar_step, cache, scanned)
    # [S, batch, size, dim] without the padding, in order; then in raster order.
    generated = jnp.moveaxis(steps, 1, 0)[:, rows.valid]
    tokens = generated if given.tokens is None else jnp.concatenate([given.tokens, generated], axis=1)
    return jax.vmap(lambda tokens, order: jnp.zeros_like(tokens).at[order].set(tokens))(tokens, order)


def _order(spec: SamplingSpec, given: Given, keys) -> jax.Array:
    """The token order of each image, int32 [batch, L]: given, or drawn with `keys` [batch]."""
    if given.order is None:
        config = spec.sampler.order_config(spec.factorization)
        return jnp.asarray(jax.vmap(lambda key: factorization.token_order(config, spec.model.grid, key))(keys))
    if given.tokens is None and given.order.shape[1] != spec.model.num_tokens:
        raise InputError("order", given.order.shape, f"must be [batch, {spec.model.num_tokens}]")
    return given.order


def _prefill(prefix: "Prefix", condition: Condition, given: Given, order, slots: int) -> tuple[KVCache, jax.Array]:
    """The cache of condition and known tokens with `slots` free slots, and the AR step that is generated first."""
    cache, first_step = prefix.begin(condition, given.num_known + slots), condition.num_steps
    if not given.num_known:
        return cache, first_step
    step = first_step + (jnp.zeros(given.num_known, jnp.int32) if given.step is None else given.step)
    known = ImageTokens(given.tokens, order[:, : given.num_known])
    return prefix.append_image(cache, known, Role.CLEAN, step, given.num_known), step[-1] + 1


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Runs condition and clean tokens through the trunk into a cache.

    Attributes:
      transformer: the Transformer.
      copies: copies of the batch in the cache: 2 where the halves of guidance have different
        keys and values, else 1.
    """

    transformer: nnx.Module
    copies: int

    def begin(self, condition: Condition, slots: int) -> KVCache:
        """A cache of the condition [copies * batch], with `slots` free slots."""
        c = self.transformer.config
        slots, batch = slots + c.num_condition_tokens + condition.num_steps, condition.batch
        cache = KVCache.empty(c.layers, batch, slots, c.heads, c.head_dim, jnp.dtype(c.dtype))
        for tokens in self.transformer.condition_tokens(condition):
            cache, _ = self.append(cache, tokens)
        return cache

    def append_image(self, cache: KVCache, image: ImageTokens, role, step, count) -> KVCache:
        """Commits clean tokens of images [batch], of which the first `count` are kept."""
        tokens = self.transformer.image_tokens(repeat_batch(image, self.copies), role, step)
        return self.append(cache, tokens, count)[0]

    def append(
        self, cache: KVCache, tokens: Tokens, count=None, noise_embedding=None, document=None
    ) -> tuple[KVCache, jax.Array]:
        """Commits tokens.

        Args:
          cache: with a free slot for each of them.
          tokens: [copies * batch, n].
          count: the first `count` are kept; default: n.
          noise_embedding, document: as in `Transformer.trunk`.

        Returns:
          The cache, and hidden states [copies * batch, n, hidden].
        """
        h, (k, v) = self.transformer.trunk(tokens, cache, noise_embedding, document=document)
        step = jnp.where(tokens.role == Role.PAD, EMPTY_STEP, tokens.step)
        return cache.append(k, v, step, tokens.h.shape[1] if count is None else count), h


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The network as a function of x_t, for the noisy tokens of one AR step.

    Attributes:
      transformer: the Transformer.
      cache: all earlier tokens.
      condition: of the images; where guided, followed by no condition (`Condition.with_unconditional`).
      ids: int [batch, n], grid token of each noisy token.
      valid: bool [n], False for padding.
      step: int32 [], the AR step.
      guided, unguided: whether any solver row is guided, and whether any is not.
    """

    transformer: nnx.Module
    cache: KVCache
    condition: Condition
    ids: jax.Array
    valid: jax.Array
    step: jax.Array
    guided: bool
    unguided: bool

    def _predict(self, x, t, copies: int):
        """Predictions [copies * batch, n, dim] for the first `copies` batches of the condition."""
        first = slice(copies * x.shape[0])
        t = jnp.full((1, 1), t)
        role = jnp.where(self.valid, Role.NOISY, Role.PAD)
        tokens = repeat_batch(self.transformer.image_tokens(ImageTokens(x, self.ids, t), role, self.step), copies)
        noise_embedding = self.transformer.embed_noise(self.condition.select(first), t)
        h, _ = self.transformer.trunk(tokens, self.cache.select(first), noise_embedding)
        return self.transformer.head(h, noise_embedding)

    def __call__(self, x, t, scale):
        """The guided prediction [batch, n, dim] for x_t [batch, n, dim]; one pass instead of two where scale is 1."""
        if not self.guided:
            return self._predict(x, t, 1)

        def both():
            conditional, unconditional = jnp.split(self._predict(x, t, 2), 2)
            return unconditional + scale * (conditional - unconditional)

        if not self.unguided:
            return both()
        return jax.lax.cond(scale != 1.0, both, lambda: self._predict(x, t, 1))


def solve(spec: SamplingSpec, denoise: Denoiser, scales, keys, x_T=None):
    """Runs the noise schedule for the tokens of one AR step.

    Args:
      spec: solver, prediction target, temperature and clipping.
      denoise: the network.
      scales: guidance weights [rows].
      keys: PRNG keys [batch] of the noise.
      x_T: initial noise [batch, n, token_dim]; default: drawn.

    Returns:
      x_0, [batch, n, token_dim].
    """
    sampler, table = spec.sampler, spec.solver_table
    shape = denoise.ids.shape[1], spec.model.token_dim

    def noise(row):
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, row), shape)
        return jax.vmap(draw)(keys)

    def evaluate(carry, scanned):
        x, begin, previous = carry
        row, scale, c = scanned
        prediction = denoise(x, c.t, scale)
        x_0, _ = to_x_0_and_eps(spec.diffusion.target, prediction, x, c.alpha, c.sigma)
        if sampler.clip_x_0:
            x_0 = jnp.clip(x_0, -sampler.clip_x_0, sampler.clip_x_0)
        begin = jnp.where(c.begins, x, begin)
        x = c.c_x * x + c.c_begin * begin + c.c_x_0 * x_0 + c.c_previous * previous
        if sampler.is_stochastic:
            x = x + sampler.temperature * c.c_noise * noise(row + 1)
        return (x, begin, x_0), None

    x_T = noise(0) if x_T is None else x_T
    rows = jnp.arange(len(table.t))
    with jax.named_scope("denoise"):
        scanned = (rows, scales, jax.tree.map(jnp.asarray, table))
        (x, _, _), _ = jax.lax.scan(evaluate, (x_T, x_T, jnp.zeros_like(x_T)), scanned)
    return x


sample_tokens = jax.jit(generate, static_argnums=0)
"""`generate`, compiled."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_tokens_shared(mesh: Mesh, spec: SamplingSpec, params, keys, condition: Condition, given: Given = NOTHING):
    """`generate` on a mesh whose devices share the images and have all parameters, without communication.

    Args:
      mesh: its axes `data` and `fsdp` split the batch.
      spec, params, keys, condition, given: as for `generate`.

    Returns:
      x_0, float32 [batch, L, token_dim] in raster order, split over the devices.
    """
    split, whole = partition(("batch",)), PartitionSpec()
    given_specs = Given(order=split, tokens=split, step=whole, x_T=split)
    run = jax.shard_map(
        functools.partial(generate, spec),
        mesh=mesh,
        in_specs=(whole, split, split, given_specs),
        out_specs=split,
        check_vma=False,
    )
    return run(params, keys, condition, given)
