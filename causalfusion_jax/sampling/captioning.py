"""Texts from images (or from nothing): cached decoding in one jitted program, and scores of given texts.

Condition and image are prefilled as clean context, then the prompts, which may differ in
length; a `lax.while_loop` adds a token to every text until all have ended. Greedy decoding is
beam search with one beam.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.config.sampling import CaptionConfig
from causalfusion_jax.core.factorization import Role
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.data.tokenizers import BEGIN, END
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.sampler import Prefix

NEVER = -1e30
"""Log-probability of what must not happen; finite, so that sums of it stay ordered."""


class Texts(NamedTuple):
    """Generated texts.

    Attributes:
      tokens: int32 [batch, T], with BEGIN and prompt; NO_TOKEN after the end.
      log_prob: float32 [batch], of what was added to the prompt, in nats.
    """

    tokens: jax.Array
    log_prob: jax.Array


class _State(NamedTuple):
    """Texts so far; rows are [batch * beams].

    Attributes:
      cache: of all tokens but the newest.
      tokens: int32 [rows, T].
      length: int32 [rows], tokens in use.
      ended: bool [rows].
      log_prob: float32 [rows].
      log_probs: float32 [rows, vocab], of the next token.
    """

    cache: KVCache
    tokens: jax.Array
    length: jax.Array
    ended: jax.Array
    log_prob: jax.Array
    log_probs: jax.Array


def read(model: TransformerConfig, params, labels, images, slots: int, noisy_tokens: bool = False):
    """Condition and images as context for a text.

    Args:
      model: what `params` are of.
      params: the Transformer's parameters.
      labels: int [batch]; num_classes stands for no class.
      images: clean tokens [batch, L, token_dim] in raster order; None: no image.
      slots: room for so many text tokens.
      noisy_tokens: the model reads images as noisy tokens at noise level 0
        (`joint.image_tokens`).

    Returns:
      A Prefix, its cache, and the AR step of the first text token.
    """
    prefix = Prefix(nnx.merge(abstract_model(model)[0], params), 1)
    if images is None:
        return prefix, prefix.begin(labels, slots), 0
    cache = prefix.begin(labels, slots + model.num_tokens)
    ids = jnp.broadcast_to(jnp.arange(model.num_tokens), images.shape[:2])
    t = jnp.zeros((images.shape[0], 1)) if noisy_tokens else None
    cache = prefix.append(cache, images, ids, Role.CLEAN, 0, model.num_tokens, labels, t)
    return prefix, cache, model.num_tokens


def generate_texts(
    model: TransformerConfig, config: CaptionConfig, noisy_tokens: bool, params, keys, labels, images, prompts
) -> Texts:
    """Generates texts. Jit with the first three arguments static.

    Args:
      model: what `params` are of.
      config: how.
      noisy_tokens: as for `read`.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], used with a temperature.
      labels: int [batch]; num_classes stands for no class.
      images: clean tokens [batch, L, token_dim] in raster order, or None.
      prompts: what each text begins with, int32 [batch, P], P <= T; BEGIN first, NO_TOKEN after
        the last of each.
    """
    batch, longest = prompts.shape
    T, beams = model.text_tokens, config.num_beams
    prefix, cache, begin = read(model, params, labels, images, longest + T, noisy_tokens)
    length = jnp.sum(prompts != NO_TOKEN, axis=1)
    cache, h = prefix.append_text(cache, prompts, jnp.arange(longest), begin + jnp.arange(longest))
    last = jnp.take_along_axis(h, length[:, None, None] - 1, axis=1)

    def log_probs(h):
        return jax.nn.log_softmax(prefix.transformer.text_logits(h)[:, 0])

    def per_beam(a, axis=0):
        return jnp.repeat(a, beams, axis=axis)

    state = _State(
        KVCache(per_beam(cache.k, 1), per_beam(cache.v, 1), per_beam(cache.step), cache.length),
        per_beam(jnp.pad(prompts, ((0, 0), (0, T - longest)), constant_values=NO_TOKEN)),
        per_beam(length),
        per_beam(length >= T),
        # All beams begin alike: only the first one counts at first.
        jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), batch),
        per_beam(log_probs(last)),
    )

    def advance(state):
        parent, token, log_prob = _choose(config, keys, state)
        if beams > 1:
            state = _of_parents(state, parent)
        token = jnp.where(state.ended, NO_TOKEN, token)
        at = jnp.arange(T) == state.length[:, None]
        tokens = jnp.where(at & ~state.ended[:, None], token[:, None], state.tokens)
        position = state.length[:, None]
        cache, h = prefix.append_text(state.cache, token[:, None], position, begin + position)
        length = state.length + ~state.ended
        ended = state.ended | (token == END) | (length >= T)
        return _State(cache, tokens, length, ended, log_prob, log_probs(h))

    state = jax.lax.while_loop(lambda state: ~jnp.all(state.ended), advance, state)
    best = jnp.argmax(state.log_prob.reshape(batch, beams), axis=1) + jnp.arange(batch) * beams
    return Texts(state.tokens[best], state.log_prob[best])


def _choose(config: CaptionConfig, keys, state: _State):
    """The next token of every row: parent rows, tokens, and log-probabilities of the texts with them."""
    allowed = jnp.where(jnp.arange(state.log_probs.shape[1]) == BEGIN, NEVER, state.log_probs)
    if config.temperature:
        draw_keys = jax.vmap(jax.random.fold_in)(keys, state.length)
        token = jax.vmap(jax.random.categorical)(draw_keys, filtered(config, allowed / config.temperature))
        gained = jnp.take_along_axis(state.log_probs, token[:, None], axis=1)[:, 0]
        return jnp.arange(len(token)), token, state.log_prob + jnp.where(state.ended, 0.0, gained)
    # An ended text goes on in one way only, which costs nothing.
    stay = jnp.where(jnp.arange(allowed.shape[1]) == END, 0.0, NEVER)
    total = state.log_prob[:, None] + jnp.where(state.ended[:, None], stay, allowed)
    beams, vocab = config.num_beams, allowed.shape[1]
    log_prob, best = jax.lax.top_k(total.reshape(-1, beams * vocab), beams)
    parent = best // vocab + beams * jnp.arange(len(best))[:, None]
    return parent.reshape(-1), (best % vocab).reshape(-1), log_prob.reshape(-1)


def filtered(config: CaptionConfig, logits):
    """Logits [rows, vocab] with those that top_k and top_p leave out at NEVER."""
    ordered = jnp.sort(logits, axis=1)[:, ::-1]
    if config.top_k:
        least = ordered[:, min(config.top_k, logits.shape[1]) - 1, None]
        logits, ordered = (jnp.where(a >= least, a, NEVER) for a in (logits, ordered))
    if config.top_p < 1.0:
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=1) - jax.nn.softmax(ordered)
        kept = jnp.sum(before < config.top_p, axis=1, keepdims=True)
        logits = jnp.where(logits >= jnp.take_along_axis(ordered, kept - 1, axis=1), logits, NEVER)
    return logits


def _of_parents(state: _State, parent) -> _State:
    """Every row as its parent's was."""
    c = state.cache
    cache = KVCache(c.k[:, parent], c.v[:, parent], c.step[parent], c.length)
    return _State(cache, *(a[parent] for a in state[1:]))


def score_texts(
    model: TransformerConfig, noisy_tokens: bool, params, labels, images, texts
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given texts, token by token. Jit with the first two arguments static.

    Several texts of one image are packed into one sequence, so that it is read once.

    Args:
      model, noisy_tokens, params, labels, images: as for `generate_texts`.
      texts: int32 [batch, texts, T], BEGIN first, NO_TOKEN after the end, and everywhere in
        what is no text.

    Returns:
      float32 [batch, texts, T - 1], nats, of the tokens after BEGIN (0 in empty slots), and
      which slots are counted, bool [batch, texts, T - 1].
    """
    batch, num, T = texts.shape
    prefix, cache, begin = read(model, params, labels, images, num * T, noisy_tokens)
    place = jnp.tile(jnp.arange(T), num)
    document = jnp.broadcast_to(jnp.repeat(jnp.arange(num), T), (batch, num * T))
    _, h = prefix.append_text(cache, texts.reshape(batch, -1), place, begin + place, document)
    logits = prefix.transformer.text_logits(h).reshape(batch, num, T, -1)[:, :, :-1]
    targets = texts[:, :, 1:]
    gained = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == NO_TOKEN, 0.0, gained), targets != NO_TOKEN


caption_tokens = functools.partial(jax.jit, static_argnums=(0, 1, 2))(generate_texts)
"""`generate_texts`, compiled."""

score_tokens = functools.partial(jax.jit, static_argnums=(0, 1))(score_texts)
"""`score_texts`, compiled."""
