"""Texts of images (or of no image): cached decoding in one jitted program, and scores of given texts.

Condition and image are prefilled as clean context, then the prompts, which may differ in
length; a `lax.while_loop` appends a token to every text until all have ended. Greedy decoding is
beam search with one beam.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.config.sampling import CaptionConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import Role
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.data.tokenizers import BEGIN, END
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.sampler import Prefix

NEVER = -1e30
"""Log-probability of excluded tokens; finite, so that sums of it stay ordered."""


GREEDY = CaptionConfig()
"""Greedy decoding."""


@dataclasses.dataclass(frozen=True)
class CaptionSpec:
    """The static arguments of generating and scoring texts.

    Attributes:
      model: settings of the network.
      noisy_tokens: the model reads images as noisy tokens at noise level 0, as
        `joint.image_tokens` says.
      search: how texts are generated; not used for scores.
    """

    model: TransformerConfig
    noisy_tokens: bool = False
    search: CaptionConfig = GREEDY


class Texts(NamedTuple):
    """Generated texts.

    Attributes:
      tokens: int32 [batch, T], from BEGIN and the prompt on; NO_TOKEN after the end.
      log_prob: float32 [batch], of the tokens after the prompt, in nats.
    """

    tokens: jax.Array
    log_prob: jax.Array


class _State(NamedTuple):
    """Unfinished texts; rows are [batch * beams].

    Attributes:
      cache: of all tokens except the last.
      tokens: int32 [rows, T].
      length: int32 [rows], number of tokens.
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


def read(spec: CaptionSpec, params, condition: Condition, images, slots: int) -> tuple[Prefix, KVCache, int]:
    """Condition and images as context for a text.

    Args:
      spec: the model, and how it reads images.
      params: the Transformer's parameters.
      condition: without text.
      images: clean tokens [batch, L, token_dim] in raster order; None: no image.
      slots: number of free slots for text tokens.

    Returns:
      A Prefix, its cache, and the AR step of the first text token.
    """
    model = spec.model
    prefix = Prefix(nnx.merge(abstract_model(model)[0], params), copies=1)
    if images is None:
        return prefix, prefix.begin(condition, slots), 0
    cache = prefix.begin(condition, slots + model.num_tokens)
    ids = jnp.broadcast_to(jnp.arange(model.num_tokens), images.shape[:2])
    t = jnp.zeros((images.shape[0], 1)) if spec.noisy_tokens else None
    noise_embedding = None if t is None else prefix.transformer.embed_noise(condition, t)
    tokens = prefix.transformer.image_tokens(ImageTokens(images, ids, t), Role.CLEAN)
    cache, _ = prefix.append(cache, tokens, noise_embedding=noise_embedding)
    return prefix, cache, model.num_tokens


def generate_texts(spec: CaptionSpec, params, keys, condition: Condition, images, prompts) -> Texts:
    """Generates texts. Jit with `spec` static.

    Args:
      spec: the model, and the search.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], used with a temperature.
      condition: without text.
      images: clean tokens [batch, L, token_dim] in raster order, or None.
      prompts: the first tokens of each text, int32 [batch, P], P <= T; BEGIN first, NO_TOKEN after
        the last one.
    """
    longest, T, beams = prompts.shape[1], spec.model.text_tokens, spec.search.num_beams
    prefix, cache, begin = read(spec, params, condition, images, longest + T)

    def append(cache, text, positions):
        """The cache with text tokens, and their hidden states."""
        return prefix.append(cache, prefix.transformer.text_tokens(text, positions, begin + positions))

    def log_probs(h):
        return jax.nn.log_softmax(prefix.transformer.text_logits(h)[:, 0])

    def advance(state):
        parent, token, log_prob = _next_tokens(spec.search, keys, state)
        if beams > 1:
            state = _of_parents(state, parent)
        token = jnp.where(state.ended, NO_TOKEN, token)
        is_next = jnp.arange(T) == state.length[:, None]
        tokens = jnp.where(is_next & ~state.ended[:, None], token[:, None], state.tokens)
        cache, h = append(state.cache, token[:, None], state.length[:, None])
        length = state.length + ~state.ended
        ended = state.ended | (token == END) | (length >= T)
        return _State(cache, tokens, length, ended, log_prob, log_probs(h))

    length = jnp.sum(prompts != NO_TOKEN, axis=1)
    cache, h = append(cache, prompts, jnp.arange(longest))
    last = jnp.take_along_axis(h, length[:, None, None] - 1, axis=1)
    state = _first_state(spec, prompts, cache, length, log_probs(last))
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.ended), advance, state)
    best = jnp.argmax(state.log_prob.reshape(-1, beams), axis=1) + jnp.arange(len(prompts)) * beams
    return Texts(state.tokens[best], state.log_prob[best])


def _first_state(spec: CaptionSpec, prompts, cache: KVCache, length, log_probs) -> _State:
    """The prompts [batch, P] as unfinished texts, one for each beam; length and log_probs of each prompt."""
    T, beams = spec.model.text_tokens, spec.search.num_beams
    tokens = jnp.pad(prompts, ((0, 0), (0, T - prompts.shape[1])), constant_values=NO_TOKEN)
    per_beam = functools.partial(jnp.repeat, repeats=beams, axis=0)
    return _State(
        cache.repeat_examples(beams),
        per_beam(tokens),
        length=per_beam(length),
        ended=per_beam(length >= T),
        # All beams are equal at first: only one of them counts.
        log_prob=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), len(prompts)),
        log_probs=per_beam(log_probs),
    )


def _next_tokens(config: CaptionConfig, keys, state: _State):
    """The next token of every row: parent rows, tokens, and log-probabilities of the texts with them."""
    allowed = jnp.where(jnp.arange(state.log_probs.shape[1]) == BEGIN, NEVER, state.log_probs)
    if config.temperature:
        draw_keys = jax.vmap(jax.random.fold_in)(keys, state.length)
        token = jax.vmap(jax.random.categorical)(draw_keys, filtered(config, allowed / config.temperature))
        gained = jnp.take_along_axis(state.log_probs, token[:, None], axis=1)[:, 0]
        return jnp.arange(len(token)), token, state.log_prob + jnp.where(state.ended, 0.0, gained)
    # An ended text has one continuation, of probability 1.
    stay = jnp.where(jnp.arange(allowed.shape[1]) == END, 0.0, NEVER)
    total = state.log_prob[:, None] + jnp.where(state.ended[:, None], stay, allowed)
    beams, vocab = config.num_beams, allowed.shape[1]
    log_prob, best = jax.lax.top_k(total.reshape(-1, beams * vocab), beams)
    parent = best // vocab + beams * jnp.arange(len(best))[:, None]
    return parent.reshape(-1), (best % vocab).reshape(-1), log_prob.reshape(-1)


def filtered(config: CaptionConfig, logits):
    """Logits [rows, vocab], NEVER for tokens that top_k and top_p exclude."""
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
    """The state of each row's parent."""
    return _State(state.cache.select(parent), *(a[parent] for a in state[1:]))


def score_texts(spec: CaptionSpec, params, condition: Condition, images, texts) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given texts, token by token. Jit with `spec` static.

    Several texts of one image are packed into one sequence, so that the image is read once.

    Args:
      spec, params, condition, images: as for `generate_texts`.
      texts: int32 [batch, texts, T], BEGIN first, NO_TOKEN after the end; an absent text is all
        NO_TOKEN.

    Returns:
      float32 [batch, texts, T - 1], nats, of the tokens after BEGIN (0 in empty slots), and
      which slots are counted, bool [batch, texts, T - 1].
    """
    batch, num, T = texts.shape
    prefix, cache, begin = read(spec, params, condition, images, num * T)
    positions = jnp.tile(jnp.arange(T), num)
    document = jnp.broadcast_to(jnp.repeat(jnp.arange(num), T), (batch, num * T))
    tokens = prefix.transformer.text_tokens(texts.reshape(batch, -1), positions, begin + positions)
    _, h = prefix.append(cache, tokens, document=document)
    logits = prefix.transformer.text_logits(h).reshape(batch, num, T, -1)[:, :, :-1]
    targets = texts[:, :, 1:]
    gained = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == NO_TOKEN, 0.0, gained), targets != NO_TOKEN


caption_tokens = jax.jit(generate_texts, static_argnums=0)
"""`generate_texts`, compiled."""

score_tokens = jax.jit(score_texts, static_argnums=0)
"""`score_texts`, compiled."""
