"""Fine-tuning: learning rates by layer, augmentation, and stopping and resuming."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny_config
from host_reads import no_implicit_reads

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.lock import FolderLock
from causalfusion_jax.config import experiment
from causalfusion_jax.config.probe import FinetuneConfig, ProbeConfig
from causalfusion_jax.data.sources import digits
from causalfusion_jax.evaluation import augment, finetune
from causalfusion_jax.evaluation.features import make_reading, place_params
from causalfusion_jax.training.stopping import Stopped, TrainingDiverged

CONFIG = experiment.from_dict(tiny_config())
READING = make_reading(CONFIG, ProbeConfig())
PLAIN = FinetuneConfig(epochs=4, batch_size=16, warmup_epochs=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0)
DECAYING = dict(layer_decay=0.5, weight_decay=0.0, learning_rate=1e-2, ema_decay=0.99)


def some(num=16):
    source = digits("train")
    return {"image": jnp.asarray(source.images[:num]), "label": jnp.asarray(source.labels[:num])}


# --- One step ---------------------------------------------------------------------


@functools.cache
def one_step(**changes):
    """Parameters before and after the first step."""
    config = finetune.FinetuneStep(READING, dataclasses.replace(PLAIN, **changes), 10, 1)
    state = finetune.init_finetune(config, random_params(READING.model))
    # The initial classifier is zero, which would stop the gradient.
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((32, 10)), jnp.float32)
    for weights in filter(None, (state.params, state.ema)):
        weights["classifier"]["kernel"] = kernel
    after, loss = jax.jit(functools.partial(finetune.finetune_step, config))(state, some(), jax.random.key(0))
    assert np.isfinite(loss)
    return state.params, after


def test_layer_decay_is_applied_layer_by_layer():
    """The first step of Adam has the size of the learning rate for any gradient, which gives the rate of a layer."""
    before, after = one_step(**DECAYING)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b), after.params, before)
    rate = {name: np.median(moved["classifier"][name]) for name in ("kernel", "bias", "shift")}
    np.testing.assert_allclose(list(rate.values()), 1e-2, rtol=1e-3)
    for name in ("qkv", "mlp_in", "attention_out"):
        by_layer = np.median(moved["network"]["blocks"][name]["kernel"].reshape(2, -1), axis=1)
        np.testing.assert_allclose(by_layer, [1e-2 / 4, 1e-2 / 2], rtol=1e-2)
    for name in ("token_in", "positions"):
        leaf = moved["network"][name]
        leaf = leaf["kernel"] if isinstance(leaf, dict) else leaf
        np.testing.assert_allclose(np.median(leaf), 1e-2 / 8, rtol=2e-2)
    # Weights that reading does not use change by weight decay only, which is 0 here.
    assert not moved["network"]["token_out"]["kernel"].any() and not moved["network"]["timestep_in"]["bias"].any()


def test_layer_scales_of_a_deep_network():
    shapes = {
        "network": {"blocks": {"w": {"kernel": jnp.zeros((24, 3, 5))}, "n": {"scale": jnp.zeros((24, 3))}},
                    "positions": jnp.zeros((4, 3))},
        "classifier": {"kernel": jnp.zeros((3, 2))},
    }  # fmt: skip
    scales = finetune.layer_scales(shapes, 24, 0.75)
    assert scales["classifier"]["kernel"] == 1.0
    assert scales["network"]["blocks"]["w"]["kernel"].shape == (24, 1, 1)
    np.testing.assert_allclose(scales["network"]["blocks"]["n"]["scale"][:, 0], 0.75 ** np.arange(24, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(scales["network"]["positions"], 0.75**25, rtol=1e-6)


def test_weight_decay_spares_vectors():
    before, after = one_step(weight_decay=1.0, layer_decay=1.0, learning_rate=1e-3)
    still = before["network"]["token_out"], after.params["network"]["token_out"]
    np.testing.assert_allclose(still[1]["kernel"], still[0]["kernel"] * (1 - 1e-3), rtol=1e-5)
    np.testing.assert_array_equal(still[1]["bias"], still[0]["bias"])


def test_average_follows_the_weights():
    before, after = one_step(**DECAYING)
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, before, after.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.ema, expected)
    assert finetune.init_finetune(finetune.FinetuneStep(READING, PLAIN, 10, 1), before["network"]).ema is None


def test_loss_is_cross_entropy_of_smoothed_labels():
    config = finetune.FinetuneStep(READING, dataclasses.replace(PLAIN, label_smoothing=0.2), 10, 1)
    params = finetune.init_finetune(config, random_params(READING.model)).params
    rng, batch, keys = np.random.default_rng(0), some(), jax.random.split(jax.random.key(0), 16)
    params["classifier"] = {
        name: jnp.asarray(leaf + rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in params["classifier"].items()
    }
    logits = np.asarray(finetune.logits_of(config, params, batch["image"], keys), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(16), np.asarray(batch["label"])]
    expected = -(0.8 * own + 0.2 * log_p.mean(1)).mean()
    np.testing.assert_allclose(finetune.finetune_loss(config, params, batch, keys), expected, rtol=1e-5)


# --- Augmentation -----------------------------------------------------------------


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_images_are(mixup, cutmix):
    """Of a black and a white image the mean of the mixture is the weight of the white one, in the target too."""
    shape = (6, 8, 1)
    targets = jax.nn.one_hot(3, 10), jax.nn.one_hot(5, 10)
    keys = jax.random.split(jax.random.key(1), 400)
    mix = functools.partial(augment.mixed, mixup=mixup, cutmix=cutmix)
    image, target = jax.vmap(lambda key: mix(jnp.zeros(shape), jnp.ones(shape), *targets, key))(keys)
    share = np.asarray(image).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(target[:, 5], share, atol=1e-5)
    np.testing.assert_allclose(target[:, 3], 1.0 - share, atol=1e-5)
    assert not np.asarray(target)[:, [0, 1, 2, 4, 6, 7, 8, 9]].any()
    assert 0.35 < share.mean() < 0.65 or (cutmix and 0.25 < share.mean() < 0.65)
    cut = np.isin(np.asarray(image), (0.0, 1.0)).all(axis=(1, 2, 3)).mean()
    low, high = {(0.8, 0.0): (0, 0.05), (0.0, 1.0): (1, 1), (0.8, 1.0): (0.4, 0.6)}[mixup, cutmix]
    assert low <= cut <= high


def test_without_mixing_nothing_changes():
    image, target = jnp.ones((4, 4, 1)), jnp.ones(3)
    same = augment.mixed(image, 0 * image, target, 0 * target, jax.random.key(0), mixup=0.0, cutmix=0.0)
    assert same[0] is image and same[1] is target
    assert augment.shifted(image, jax.random.key(0), 0) is image
    assert augment.cropped(image, jax.random.key(0), 1.0) is image


def test_smoothed_labels():
    np.testing.assert_allclose(augment.smooth_one_hot(jnp.int32(1), 4, 0.2), [0.05, 0.85, 0.05, 0.05], rtol=1e-6)


def test_shifts_are_those_of_whole_pixels():
    clip = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6, 3)), jnp.float32)
    padded = np.pad(clip, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    possible = {padded[:, y : y + 5, x : x + 6].tobytes() for y in range(3) for x in range(3)}
    shift = jax.jit(jax.vmap(lambda key: augment.shifted(clip, key, 1)))
    shifted = {np.asarray(image).tobytes() for image in shift(jax.random.split(jax.random.key(0), 80))}
    assert shifted == possible


def test_crops_are_parts_of_the_image():
    """The crop of a ramp is a ramp whose slope and ends show its position."""
    rows, columns = np.mgrid[:16, :24].astype(np.float32)
    ramp = jnp.asarray(np.stack([rows, columns], axis=-1))
    crop = jax.jit(jax.vmap(lambda key: augment.cropped(ramp, key, 0.3)))
    image = np.asarray(crop(jax.random.split(jax.random.key(0), 60)))[:, 4:-4, 4:-4]
    slopes = np.stack([np.diff(image[..., 0], axis=1).mean((1, 2)), np.diff(image[..., 1], axis=2).mean((1, 2))], 1)
    assert image.shape == (60, 8, 16, 2) and image.min() >= 0 and (image.max(axis=(0, 1, 2)) <= (15, 23)).all()
    areas = slopes.prod(axis=1)
    assert 0.29 <= areas.min() < 0.4 and 0.8 < areas.max() <= 1.001 and slopes.max() <= 1.001


# --- A whole fine-tuning ----------------------------------------------------------


class Digits:
    """The first digits of a split."""

    def __init__(self, num, split="train"):
        self.images, self.labels = digits(split).images[:num], digits(split).labels[:num]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


@functools.cache
def compiled(config, mesh):
    shapes = {"image": ((16, 8, 8, 1), np.float32), "label": ((16,), np.int32)}
    return compile_finetune_step(config, mesh, shapes, jax.random.key(0))


compile_finetune_step = finetune.compile_finetune_step


@pytest.fixture
def compiled_once(monkeypatch):
    """A program for all runs of the same settings."""
    monkeypatch.setattr(finetune, "compile_finetune_step", lambda config, mesh, shapes, key: compiled(config, mesh))


def run(folder, devices=1, **changes):
    settings = dataclasses.replace(
        PLAIN, mixup=0.8, cutmix=1.0, drop_path=0.1, shift=1, layer_decay=0.8, checkpoint_epochs=1, **changes
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
    folder.mkdir(exist_ok=True)
    tuning = finetune.Finetuning(READING, settings, CONFIG.data, Digits(70), mesh, folder)
    with no_implicit_reads():
        weights = tuning.train(lambda: place_params(random_params(READING.model), READING.model, mesh))
        return jax.device_get(weights), tuning.test(weights, Digits(50, "held_out"), ProbeConfig(read_batch_size=32))


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch, compiled_once):
    whole, accuracies = run(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and set(accuracies) == {"top1", "top5"}
    # Stopped after the sixth of sixteen steps, in the middle of an epoch.
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "should_stop", lambda poll, received: poll == 6)
        with pytest.raises(Stopped, match="SIGTERM: saved step 6 of 16"):
            run(tmp_path / "parts")
    # What a kill can leave: a line of an epoch that is trained again, and half a line.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 0.0, "seconds": 1.0}\n{"epoch": 3, "lo')
    again, same = run(tmp_path / "parts")
    resumed = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in resumed] == [(line["epoch"], line["loss"]) for line in lines]
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert same == accuracies
    # Complete: nothing is trained any more.
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "parts")[0], whole)


def test_a_state_that_is_not_finite_is_not_saved_over_the_only_checkpoint(tmp_path, monkeypatch, compiled_once):
    """Stopped in the middle of an epoch, after a step that gave NaN."""
    original_compile = finetune.compile_finetune_step

    def compile_step(*args):
        step = original_compile(*args)

        def run_step(state, batch, key):
            state, loss = step(state, batch, key)
            with jax.transfer_guard("allow"):
                factor = jnp.nan if int(state.step) == 6 else 1.0
                return state._replace(params=jax.tree.map(lambda leaf: leaf * factor, state.params)), loss

        return run_step

    monkeypatch.setattr(finetune, "compile_finetune_step", compile_step)
    monkeypatch.setattr(distributed, "should_stop", lambda poll, received: poll == 6)
    with pytest.raises(TrainingDiverged, match="epoch 2 .* not finite"):
        run(tmp_path / "run")
    assert Checkpoints(tmp_path / "run", read_only=True).good_step() == 4


def test_a_second_fine_tuning_in_a_folder_is_refused(tmp_path):
    with FolderLock(tmp_path, "--out"), pytest.raises(InputError, match="--out=.*is in use by process"):
        run(tmp_path)


def test_devices_share_a_step(tmp_path, compiled_once):
    alone, shared = (run(tmp_path / str(n), n)[0] for n in (1, 2))
    # Adam divides by the size of the gradient, which magnifies the rounding of small gradients.
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(shared["classifier"][name], alone["classifier"][name], atol=1e-3)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run["network"])]) for run in (alone, shared)]
    assert np.mean(np.abs(flat[0] - flat[1]) > 1e-3) < 0.02


def test_batches_that_do_not_fit_are_refused(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:4])
    for size, match in ((18, "multiple of 4"), (72, "must be <= 70")):
        with pytest.raises(InputError, match=f"config.finetune.batch_size={size}: .*{match}"):
            finetune.Finetuning(
                READING, dataclasses.replace(PLAIN, batch_size=size), CONFIG.data, Digits(70), mesh, tmp_path
            )
