"""Cached decoding of texts against an uncached, plain Python loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.sampling import CaptionConfig, SamplerConfig
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig
from causalfusion_jax.core.layouts import NO_TOKEN, Task, pair_layout
from causalfusion_jax.data.tokenizers import BEGIN, END
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.sampling.captioning import GREEDY, CaptionSpec, caption_tokens, filtered, score_tokens
from causalfusion_jax.sampling.sampler import SamplingSpec, image_keys, sample_tokens

T, VOCAB = 9, 7
MODEL = TransformerConfig(
    hidden=32, heads=2, layers=2, grid=(2, 3), token_dim=4, num_classes=5, text_vocab=VOCAB, text_tokens=T,
)  # fmt: skip
ADALN = TransformerConfig(**(MODEL.__dict__ | ACDIT | {"text_head": "separate"}))
PROMPTS = np.full((4, 5), NO_TOKEN, np.int32)
for row, prompt in enumerate([[BEGIN], [BEGIN, 3, 4], [BEGIN, 2], [BEGIN, 5, 5, 2, 6]]):
    PROMPTS[row, : len(prompt)] = prompt
CONDITION = Condition(np.full(4, 5))
IMAGES = np.random.default_rng(0).standard_normal((4, 6, 4)).astype(np.float32)


@functools.cache
def params(config=MODEL):
    return random_params(config, 0.3)


@functools.cache
def whole_sequence(config):
    """Logits of every text token from one pass over the training frame, nothing cached."""
    weights = params(config)

    @jax.jit
    def run(text, images):
        model = nnx.merge(abstract_model(config)[0], weights)
        batch, length = text.shape[0], config.num_tokens
        task = jnp.full(batch, Task.TEXT if images is None else Task.IMAGE_TO_TEXT)
        ids = jnp.tile(jnp.arange(length), (batch, 1))
        role, step = pair_layout(task, config.num_condition_tokens, text != NO_TOKEN, jnp.zeros_like(ids), length)
        images = jnp.zeros((batch, length, config.token_dim)) if images is None else images
        condition, t = Condition(jnp.full(batch, 5), text), jnp.zeros((batch, 1))
        _, hidden = model.sequence(condition, ImageTokens(images, ids), ImageTokens(images, ids, t), role, step)
        return model.text_logits(hidden)

    return run


def uncached_greedy(config, images, prompts):
    """Token for token, the whole sequence anew each time."""
    text = np.full((len(prompts), T), NO_TOKEN, np.int32)
    text[:, : prompts.shape[1]] = prompts
    total = np.zeros(len(prompts))
    for row in range(len(prompts)):
        while True:
            length = int((text[row] != NO_TOKEN).sum())
            if length == T or text[row, length - 1] == END:
                break
            # The whole batch each time, so that one program serves all.
            logits = np.asarray(whole_sequence(config)(text, images))[row, length - 1]
            log_probs = logits - np.log(np.exp(logits).sum())
            choice = int(np.argmax(np.where(np.arange(VOCAB) == BEGIN, -np.inf, logits)))
            total[row] += log_probs[choice]
            text[row, length] = choice
    return text, total


def decode(config, search=GREEDY, images=IMAGES, prompts=PROMPTS, seed=0):
    keys = image_keys(seed, np.arange(len(prompts)))
    texts = caption_tokens(CaptionSpec(config, search=search), params(config), keys, CONDITION, images, prompts)
    return np.asarray(texts.tokens), np.asarray(texts.log_prob)


@pytest.mark.parametrize(
    ("config", "images"), [(MODEL, IMAGES), (ADALN, IMAGES), (MODEL, None)], ids=["in_context", "adaln", "text only"]
)
def test_cached_equals_uncached(config, images):
    """Greedy, token for token, prompts of unequal length in one batch; and so the log-probabilities."""
    expected, total = uncached_greedy(config, images, PROMPTS)
    tokens, log_prob = decode(config, images=images)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(log_prob, total, rtol=1e-4, atol=1e-4)
    assert len({int((row != NO_TOKEN).sum()) for row in expected}) > 1, "texts end at different lengths"


@pytest.mark.parametrize("config", [MODEL, ADALN], ids=["in_context", "adaln"])
def test_likelihood_is_that_of_teacher_forcing(config):
    """What decoding adds up, a causal run over the cache, and a whole pass agree."""
    tokens, log_prob = decode(config, prompts=PROMPTS[:, :1] * 0 + BEGIN)
    scored = score_tokens(CaptionSpec(config), params(config), CONDITION, IMAGES, tokens[:, None])
    gained, counted = (np.asarray(a)[:, 0] for a in scored)
    np.testing.assert_allclose(gained.sum(axis=1), log_prob, rtol=1e-4, atol=1e-4)
    logits = np.asarray(whole_sequence(config)(tokens, IMAGES))[:, :-1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    forced = np.take_along_axis(log_probs, np.maximum(tokens[:, 1:], 0)[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(gained, np.where(counted, forced, 0.0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(counted, tokens[:, 1:] != NO_TOKEN)


def test_wide_beams_find_the_most_probable_text():
    """As many beams as there are prefixes: exhaustive, so the best of all texts of two more tokens."""
    prompts = np.full((4, T - 2), 3, np.int32)
    prompts[:, 0] = BEGIN
    tokens, log_prob = decode(MODEL, CaptionConfig(num_beams=6), prompts=prompts)
    endings = [(END,)] + [pair for pair in itertools.product(range(1, VOCAB), repeat=2) if pair[0] != END]
    slots = np.full((len(endings), T), NO_TOKEN, np.int32)
    slots[:, : T - 2] = prompts[0]
    for row, ending in enumerate(endings):
        slots[row, T - 2 : T - 2 + len(ending)] = ending
    # All of them packed into one sequence.
    gained, _ = score_tokens(CaptionSpec(MODEL), params(), CONDITION, IMAGES, np.tile(slots, (4, 1, 1)))
    total = np.asarray(gained)[:, :, T - 3 :].sum(axis=2)
    np.testing.assert_array_equal(tokens, slots[np.argmax(total, axis=1)])
    np.testing.assert_allclose(log_prob, total.max(axis=1), rtol=1e-4, atol=1e-4)


def test_packed_texts_do_not_see_each_other():
    """Texts of one image in one sequence score as each alone, exactly where another one changes."""
    texts = np.full((4, 2, T), NO_TOKEN, np.int32)
    texts[:, 0, :4] = [BEGIN, 3, 4, END]
    texts[:, 1, :6] = [BEGIN, 5, 5, 2, 6, END]

    def score(texts):
        return np.asarray(score_tokens(CaptionSpec(MODEL), params(), CONDITION, IMAGES, texts)[0])

    packed = score(texts)
    for i in range(2):
        np.testing.assert_allclose(packed[:, i], score(texts[:, i : i + 1])[:, 0], rtol=1e-4, atol=1e-4)
    other = texts.copy()
    other[:, 0, 1] = 6
    np.testing.assert_array_equal(score(other)[:, 1], packed[:, 1])
    assert (score(other)[:, 0, :3] != packed[:, 0, :3]).all()


def test_draws_follow_the_distribution():
    many = 600
    prompts = np.full((many, T - 1), 2, np.int32)
    prompts[:, 0] = BEGIN
    images = np.repeat(IMAGES[:1], many, axis=0)
    spec = CaptionSpec(MODEL, search=CaptionConfig(temperature=2.0, top_k=4))
    keys, condition = image_keys(0, np.arange(many)), Condition(np.full(many, 5))
    texts = caption_tokens(spec, params(), keys, condition, images, prompts)
    observed = np.bincount(np.asarray(texts.tokens)[:, -1], minlength=VOCAB) / many
    text = np.full((4, T), NO_TOKEN, np.int32)
    text[:, :-1] = prompts[:4]
    logits = np.asarray(whole_sequence(MODEL)(text, images[:4]))[0, T - 2].astype(np.float64)
    p = np.exp(logits / 2.0) * (np.arange(VOCAB) != BEGIN)
    p[np.argsort(p)[:-4]] = 0
    np.testing.assert_allclose(observed, p / p.sum(), atol=0.07)
    assert not observed[p == 0].any()


def test_top_k_and_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.25]]))

    def kept(**limits):
        return np.flatnonzero(np.asarray(filtered(CaptionConfig(temperature=1.0, **limits), logits))[0] > -100).tolist()

    assert kept() == [0, 1, 2, 3] and kept(top_k=2) == [0, 2] and kept(top_k=9) == [0, 1, 2, 3]
    # The most probable that together reach it.
    assert kept(top_p=0.3) == [0] and kept(top_p=0.5) == [0, 2] and kept(top_p=0.71) == [0, 2, 3]
    # Of what top_k leaves, 0.4 and 0.3, the first is more than half.
    assert kept(top_k=2, top_p=0.5) == [0]


@pytest.mark.parametrize(
    "bad",
    [dict(num_beams=0), dict(temperature=-1.0), dict(top_k=3), dict(top_p=0.0), dict(temperature=1.0, num_beams=2)],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError):
        CaptionConfig(**bad)


@pytest.mark.parametrize("config", [MODEL, ADALN], ids=["in_context", "adaln"])
def test_an_empty_prompt_is_no_prompt(config):
    """Empty slots of prompts change nothing, and guidance leads away from no text."""

    def run(cfg_scale=1.0, text=None):
        sampler = SamplerConfig(ar_steps=2, solver_steps=2, order="raster", cfg_scale=cfg_scale)
        spec = SamplingSpec(config, DiffusionConfig(), FactorizationConfig(), sampler)
        condition = Condition(CONDITION.labels[:2], text)
        return np.asarray(sample_tokens(spec, params(config), image_keys(0, np.arange(2)), condition))

    text = np.full((2, 5), NO_TOKEN, np.int32)
    text[:, :3] = [[BEGIN, 4, END], [BEGIN, 3, END]]
    nothing = np.full_like(text, NO_TOKEN)
    prompted, unprompted = run(text=text), run()
    np.testing.assert_allclose(run(text=nothing), unprompted, rtol=2e-3, atol=2e-4)
    assert np.abs(prompted - unprompted).max() > 1e-2
    if config is MODEL:
        np.testing.assert_allclose(run(text=text[:, :3]), prompted, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(run(3.0, text=nothing), unprompted, rtol=1e-2, atol=1e-3)
        assert np.abs(run(3.0, text=text) - prompted).max() > 1e-2
