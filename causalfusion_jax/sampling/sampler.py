"""The KV-cached sampler: every order, every split, every solver, one jitted program.

Condition (and known clean) tokens are prefilled into the cache. Each AR step then
starts from fresh noise for its own tokens only, runs the whole noise schedule for them
against the frozen cache, and commits the clean result to the cache (CausalFusion
section 3.2). Where clean tokens do not depend on the class (adaLN on the noisy ones only),
their keys and values are computed and kept once for both halves of guidance. Both axes
are `lax.scan`s, so a program's size does not grow with either.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.sharding import partition
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core import factorization
from causalfusion_jax.core.diffusion import DiffusionConfig, to_x_0_and_eps
from causalfusion_jax.core.factorization import CONDITION_STEP, EMPTY_STEP, FactorizationConfig, Role
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.core.solvers import solver_table
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.flops import forward_flops
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.transformer import abstract_model


def guidance_scales(sampler: SamplerConfig, t: np.ndarray, num_timesteps: int, sizes) -> np.ndarray:
    """Guidance weight of every AR step and solver row; float32 [S, rows].

    Args:
      sampler: names scale, schedule and interval.
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
    """Model FLOPs of generating one image, of a prompt of so many `text_tokens`.

    Prefill of the condition and the prompt, every solver row of every AR step against the cache as it then
    stands (twice where guided), and the commits of all AR steps but the last.
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
    """One key for each image number, so that an image does not depend on its batch."""
    key = jax.random.key(seed)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


def generate(
    model: TransformerConfig,
    diffusion: DiffusionConfig,
    trained: FactorizationConfig,
    sampler: SamplerConfig,
    params,
    keys,
    labels,
    order=None,
    known=None,
    known_step=None,
    x_T=None,
    text=None,
):
    """Generates images as tokens. Jit with the first four arguments static.

    Args:
      model, diffusion, trained: what `params` were trained as.
      sampler: how to sample.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one an image (`image_keys`).
      labels: int [batch].
      order: int32 [batch, L]; default: drawn as `sampler.order` says.
      known: clean tokens [batch, K, token_dim] at the first K places of `order`; the
        remaining L - K places are generated.
      known_step: int32 [K], their AR steps, non-decreasing from 0; default: all 0.
      x_T: noise to start from at those L - K places, [batch, L - K, token_dim]; default:
        drawn.
      text: prompts, int32 [batch, T], NO_TOKEN in empty slots, for a model that knows text;
        guidance leads away from no class and no text.

    Returns:
      x_0, float32 [batch, L, token_dim] in raster order.

    Raises:
      InputError: the sampler does not fit the model.
    """
    num_known = 0 if known is None else known.shape[1]
    sizes = sampler.sizes(model.num_tokens - num_known)
    table = solver_table(sampler, diffusion)
    scales = guidance_scales(sampler, table.t, diffusion.num_timesteps, sizes)
    order_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if order is None:
        order_config = sampler.order_config(trained)
        order = jax.vmap(lambda key: factorization.token_order(order_config, model.grid, key))(order_keys)
        order = jnp.asarray(order)
    elif known is None and order.shape[1] != model.num_tokens:
        raise InputError("order", order.shape, f"must be [batch, {model.num_tokens}]")
    transformer = nnx.merge(abstract_model(model)[0], params)
    # Guidance runs condition and no condition side by side, [2 * batch].
    guided, unguided = bool((scales != 1.0).any()), bool((scales == 1.0).any())
    all_labels = jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)]) if guided else labels

    # AR steps as rows of one size, short ones padded: what lax.scan needs.
    size, starts = max(sizes), np.cumsum([0, *sizes[:-1]])
    places = np.minimum(starts[:, None] + np.arange(size), sum(sizes) - 1)
    valid = np.arange(size) < np.asarray(sizes)[:, None]
    rows = lambda a: jnp.moveaxis(a[:, places], 1, 0)
    num_text = 0 if text is None else text.shape[1]
    first_step = num_text
    if num_known:
        known_step = num_text + (jnp.zeros(num_known, jnp.int32) if known_step is None else known_step)
        first_step = known_step[-1] + 1

    slots = num_text + num_known + (int(starts[-2]) + size if len(sizes) > 1 else 0)
    prefix = Prefix(transformer, 2 if guided and (model.clean_depends_on_class or num_text) else 1)
    cache = prefix.begin(all_labels[: prefix.copies * labels.shape[0]], slots)
    if num_text:
        cache = prefix.append_prompts(cache, text)
    if num_known:
        cache = prefix.append(cache, known, order[:, :num_known], Role.CLEAN, known_step, num_known)

    def ar_step(cache, scanned):
        index, ids, valid, count, scales_row, x_T = scanned
        step = index + first_step
        denoise = _Denoiser(transformer, diffusion, cache, all_labels, ids, valid, step, guided, unguided)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, index)
        x_0 = _solve(denoise, table, scales_row, sampler, step_keys, (size, model.token_dim), x_T)

        def commit(cache):
            return prefix.append(cache, x_0, ids, jnp.where(valid, Role.CLEAN, Role.PAD), step, count)

        if len(sizes) > 1:
            with jax.named_scope("commit"):
                # Nobody looks at the last step's clean tokens.
                cache = jax.lax.cond(index < len(sizes) - 1, commit, lambda cache: cache, cache)
        return cache, x_0

    scanned = (
        jnp.arange(len(sizes)),
        rows(order[:, num_known:]),
        jnp.asarray(valid),
        jnp.asarray(sizes),
        jnp.asarray(scales),
        None if x_T is None else rows(x_T),
    )
    _, steps = jax.lax.scan(ar_step, cache, scanned)
    # [S, batch, size, dim] without the padding, in order; then back to raster order.
    generated = jnp.moveaxis(steps, 1, 0)[:, valid]
    tokens = generated if known is None else jnp.concatenate([known, generated], axis=1)
    raster = jax.vmap(lambda tokens, order: jnp.zeros_like(tokens).at[order].set(tokens))
    return raster(tokens, order)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Runs condition and clean tokens through the trunk into a cache.

    The cache holds `copies` of the batch: 2 where guidance has a prefix of its own.
    """

    transformer: nnx.Module
    copies: int

    def begin(self, labels, slots: int) -> KVCache:
        """A cache with the condition tokens of `labels` [copies * batch], and room for `slots` more."""
        c = self.transformer.config
        slots, batch = slots + c.num_condition_tokens, labels.shape[0]
        cache = KVCache.empty(c.layers, batch, slots, c.heads, c.head_dim, jnp.dtype(c.dtype))
        if not c.num_condition_tokens:
            return cache
        h = self.transformer.embed_condition(labels)
        return self._run(cache, h, Role.CONDITION, CONDITION_STEP, -1, c.num_condition_tokens)[0]

    def append(self, cache: KVCache, tokens, ids, role, step, count, labels=None, t=None) -> KVCache:
        """Commits clean tokens [batch, n, token_dim], of which the first `count` are kept.

        With `t` [batch, 1] they are embedded as noisy ones of that level, as images of
        `labels` [batch].
        """
        tokens, ids = (jnp.tile(a, (self.copies, *[1] * (a.ndim - 1))) for a in (tokens, ids))
        condition = None if t is None else self.transformer.noise_condition(labels, t)
        return self._run(cache, self.transformer.embed_tokens(tokens, ids, t), role, step, ids, count, condition)[0]

    def append_prompts(self, cache: KVCache, text) -> KVCache:
        """Commits prompts [batch, T] at AR steps 0..T-1; the second copy of the batch goes without."""
        text = jnp.concatenate([text, *[jnp.full_like(text, NO_TOKEN)] * (self.copies - 1)])
        return self.append_text(cache, text, jnp.arange(text.shape[1]), jnp.arange(text.shape[1]))[0]

    def append_text(self, cache: KVCache, text, positions, step, document=None) -> tuple[KVCache, jax.Array]:
        """Commits text tokens int [copies * batch, n], NO_TOKEN where there is none.

        Args:
          cache: with room for n slots.
          text: token ids.
          positions, step: their places in the text and AR steps, int [copies * batch, n] or [n].
          document: int [copies * batch, n], where they are several texts, blind to each other.

        Returns:
          The cache, and hidden states [copies * batch, n, hidden] for `Transformer.text_logits`.
        """
        h = self.transformer.text.embed(text, positions)
        role = jnp.where(text == NO_TOKEN, Role.PAD, Role.CLEAN)
        return self._run(cache, h, role, step, -1, text.shape[1], document=document)

    def _run(self, cache, h, role, step, ids, count, condition=None, document=None):
        role, step, ids = (jnp.broadcast_to(jnp.asarray(a, jnp.int32), h.shape[:2]) for a in (role, step, ids))
        h, (k, v) = self.transformer.trunk(h, role, step, ids, cache, condition, document=document)
        return cache.append(k, v, jnp.where(role == Role.PAD, EMPTY_STEP, step), count), h


@dataclasses.dataclass(frozen=True)
class _Denoiser:
    """The network as a function of x_t for the noisy tokens of one AR step.

    `guided` and `unguided` say whether any row of the schedule is so; `labels` are those
    of all images, and where guided, after them no class as often.
    """

    transformer: nnx.Module
    diffusion: DiffusionConfig
    cache: KVCache
    labels: jax.Array
    ids: jax.Array
    valid: jax.Array
    step: jax.Array
    guided: bool
    unguided: bool

    def _predict(self, x, t, copies: int):
        """Predictions [copies * batch, n, dim] for the first copies of the labels."""
        batch = copies * x.shape[0]
        cache = jax.tree.map(lambda a: a[:, :batch], (self.cache.k, self.cache.v))
        cache = KVCache(*cache, self.cache.step[:batch], self.cache.length)
        t = jnp.full((1, 1), t)
        h = jnp.tile(self.transformer.embed_tokens(x, self.ids, t), (copies, 1, 1))
        condition = self.transformer.noise_condition(self.labels[:batch], t)
        role = jnp.broadcast_to(jnp.where(self.valid, Role.NOISY, Role.PAD), h.shape[:2])
        step = jnp.broadcast_to(self.step, h.shape[:2])
        h, _ = self.transformer.trunk(h, role, step, jnp.tile(self.ids, (copies, 1)), cache, condition)
        return self.transformer.head(h, condition)

    def __call__(self, x, t, scale):
        """The guided prediction, [batch, n, dim]; no second pass where scale is 1."""
        if not self.guided:
            return self._predict(x, t, 1)

        def both():
            conditional, unconditional = jnp.split(self._predict(x, t, 2), 2)
            return unconditional + scale * (conditional - unconditional)

        if not self.unguided:
            return both()
        return jax.lax.cond(scale != 1.0, both, lambda: self._predict(x, t, 1))


def _solve(denoise: _Denoiser, table, scales, sampler: SamplerConfig, keys, shape, x_T=None):
    """Runs the noise schedule for the tokens of one AR step.

    Args:
      denoise: the network.
      table: the solver, SolverTable of [rows].
      scales: guidance weights [rows].
      sampler: temperature and clipping.
      keys: [batch].
      shape: (tokens, token_dim) of one image.
      x_T: where to start, [batch, *shape]; default: drawn.

    Returns:
      x_0, [batch, *shape].
    """

    def noise(row):
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, row), shape)
        return jax.vmap(draw)(keys)

    def evaluate(carry, scanned):
        x, begin, previous = carry
        row, scale, c = scanned
        prediction = denoise(x, c.t, scale)
        x_0, _ = to_x_0_and_eps(denoise.diffusion.target, prediction, x, c.alpha, c.sigma)
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


sample_tokens = jax.jit(generate, static_argnums=(0, 1, 2, 3))
"""`generate`, compiled."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def sample_tokens_shared(
    mesh: Mesh,
    model: TransformerConfig,
    diffusion: DiffusionConfig,
    trained: FactorizationConfig,
    sampler: SamplerConfig,
    params,
    of_images: dict[str, jax.Array],
    of_all: dict[str, jax.Array] | None = None,
):
    """`generate` on a mesh whose devices share the images and have all parameters; none waits for another.

    Args:
      mesh: its axes `data` and `fsdp` split the batch.
      model, diffusion, trained, sampler, params: as of `generate`.
      of_images: those arguments of `generate` that have an entry an image, by name.
      of_all: the others.

    Returns:
      What `generate` does.
    """

    def share(params, of_images, of_all):
        return generate(model, diffusion, trained, sampler, params, **of_images, **of_all)

    split = partition(("batch",))
    whole = PartitionSpec()
    run = jax.shard_map(share, mesh=mesh, in_specs=(whole, split, whole), out_specs=split, check_vma=False)
    return run(params, of_images, of_all or {})
