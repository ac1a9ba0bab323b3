"""Layouts of texts and images against the rule in words, one pair of tokens at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_params

from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import FactorizationConfig, Role, attends, draw_plan
from causalfusion_jax.core.layouts import TASKS, Task, image_text_image_layout, pair_layout, single_image_layout
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.sequence import ImageTokens
from causalfusion_jax.models.transformer import abstract_model

C, T = 2, 5


def document(task, length, step, one_step=True):
    """The tokens of a frame in words: (what, when) of each slot, or None where nothing is.

    `when` is (part of the document, position within it).
    """
    text_at, image_at = {"text_to_image": (0, 1), "image_to_text": (1, 0), "text": (0, None), "image": (None, 0)}[task]
    steps = [0] * len(step) if task == "image_to_text" and one_step else list(step)
    drawn = task in ("text_to_image", "image")
    frame = [("condition", (-1, 0))] * C
    frame += [("text", (text_at, i)) if text_at is not None and i < length else None for i in range(T)]
    frame += [("clean", (image_at, s)) if image_at is not None else None for s in steps]
    return frame + [("noisy", (image_at, s)) if drawn else None for s in steps]


def sees(query, key):
    """The rule in words."""
    if query is None or key is None:
        return query is None and key is None
    (q, q_when), (k, k_when) = query, key
    if k == "noisy":
        return q == "noisy" and q_when == k_when
    return k_when < q_when or (k_when == q_when and q != "noisy")


def dense(frame):
    return np.array([[sees(q, k) for k in frame] for q in frame])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("one_step", [True, False])
def test_masks_are_the_rule_in_words(task, one_step):
    rng = np.random.default_rng(0)
    for _ in range(8):
        length = int(rng.integers(0, T + 1))
        step = np.sort(rng.integers(0, 4, 6))
        step = np.unique(step, return_inverse=True)[1]
        role, steps = pair_layout(Task[task.upper()], C, np.arange(T) < length, step, 6, one_step)
        expected = dense(document(task, length, step, one_step))
        np.testing.assert_array_equal(attends(role, steps, role, steps), expected)


@pytest.mark.parametrize("task", TASKS)
def test_masks_of_one_copy_of_the_image(task):
    """Transfusion: text causal, the image one step of full attention."""
    for length in (0, 3, T):
        frame = document(task, length, [0] * 4)
        text, clean, noisy = frame[: C + T], frame[C + T : C + T + 4], frame[C + T + 4 :]
        frame = text + (clean if task == "image_to_text" else noisy)
        role, step = single_image_layout(Task[task.upper()], C, np.arange(T) < length, np.zeros(4, int))
        np.testing.assert_array_equal(attends(role, step, role, step), dense(frame))


def test_masks_of_an_image_a_text_and_an_image():
    rng = np.random.default_rng(1)
    for length in (0, 3, T):
        first, second = (np.unique(np.sort(rng.integers(0, 3, 4)), return_inverse=True)[1] for _ in range(2))
        frame = [("condition", (-1, 0))] * C + [("text", (1, i)) if i < length else None for i in range(T)]
        frame += [("clean", (0, s)) for s in first] + [("clean", (2, s)) for s in second[:3]]
        frame += [("noisy", (2, s)) for s in second]
        role, step = image_text_image_layout(C, first, np.arange(T) < length, second, 3)
        np.testing.assert_array_equal(attends(role, step, role, step), dense(frame))


def test_a_batch_mixes_tasks():
    tasks = jnp.array([0, 1, 2, 3])
    used = np.arange(T)[None] < np.array([[1], [2], [3], [4]])
    step = jnp.tile(jnp.array([0, 0, 1]), (4, 1))
    role, steps = pair_layout(tasks, C, used, step, 3)
    for i in range(4):
        alone = pair_layout(tasks[i], C, used[i], step[i], 3)
        np.testing.assert_array_equal(role[i], alone[0])
        np.testing.assert_array_equal(steps[i][role[i] != Role.PAD], alone[1][alone[0] != Role.PAD])


# --- Nothing leaks ----------------------------------------------------------------

MODEL = TransformerConfig(
    hidden=32, heads=2, layers=2, grid=(2, 3), token_dim=4, num_classes=5, num_condition_tokens=C,
    text_vocab=11, text_tokens=T,
)  # fmt: skip
ADALN = TransformerConfig(**(MODEL.__dict__ | ACDIT))


@functools.partial(jax.jit, static_argnums=0)
def outputs(config, params, args):
    """Predictions of noisy tokens and logits of text tokens, each a value a token."""
    model = nnx.merge(abstract_model(config)[0], params)
    prediction, hidden = model.sequence(*args)
    return model.text_logits(hidden), prediction


def random_example(rng, task):
    """Inputs of one example with a drawn order, split and length, and its frame in words."""
    config = FactorizationConfig(gamma=0.95)
    plan = draw_plan(config, MODEL.grid, jax.random.key(int(rng.integers(1 << 30))))
    length = int(rng.integers(1, T + 1))
    text = np.where(np.arange(T) < length, rng.integers(0, 11, T), -1)
    clean, noisy = rng.standard_normal((2, 6, 4)).astype(np.float32)
    one_step = bool(rng.integers(2))
    frame = document(task, length, np.asarray(plan.step), one_step)
    role, step = pair_layout(Task[task.upper()], C, text >= 0, plan.step, 6, one_step)
    return dict(text=text, clean=clean, noisy=noisy, order=np.asarray(plan.order), role=role, step=step), frame


@pytest.mark.parametrize("config", [MODEL, ADALN], ids=["in_context", "adaln"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_leaks(config, task):
    """Changing any token leaves every output that must not see it bit-unchanged, and changes the others."""
    params, rng = random_params(config), np.random.default_rng(3)
    example, frame = random_example(rng, task)
    frame = frame[C - config.num_condition_tokens :]
    tokens, c = T + 12, config.num_condition_tokens
    batch = {name: np.repeat(np.asarray(value)[None], tokens, axis=0) for name, value in example.items()}
    role, step = (batch[name][:, C - c :] for name in ("role", "step"))

    def run():
        order = batch["order"]
        condition = Condition(np.full(tokens, 5), batch["text"])
        clean, noisy = ImageTokens(batch["clean"], order), ImageTokens(batch["noisy"], order, np.full((tokens, 1), 300))
        return [np.asarray(out) for out in outputs(config, params, (condition, clean, noisy, role, step))]

    before = run()
    # In each copy one token of text, clean or noisy is another.
    for i in range(tokens):
        if i < T:
            batch["text"][i, i] = (batch["text"][i, i] + 1) % 11 if batch["text"][i, i] >= 0 else -1
        else:
            batch["clean" if i < T + 6 else "noisy"][i, (i - T) % 6] += 1.0
    after = run()
    # Dependence through any number of layers.
    reach = dense(frame)
    for _ in range(5):
        reach = reach | (reach.astype(int) @ reach > 0)
    for i in range(tokens):
        if frame[c + i] is None:
            continue
        for old, new, first in zip(before, after, (c, c + T + 6), strict=True):
            for position in (i for i in range(old.shape[1]) if frame[first + i] is not None):
                same = np.array_equal(old[i, position], new[i, position])
                assert same != reach[first + position, c + i], (task, i, position)
