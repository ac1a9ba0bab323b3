"""Exporting and importing keeps settings, class names, step and every value."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from safetensors import safe_open
from tiny_data import TINY_VAE

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.workdir import claim_workdir
from causalfusion_jax.data.class_names import store_class_names
from causalfusion_jax.models.autoencoder import abstract_autoencoder
from causalfusion_jax.models.presets import ACDIT, DIT
from causalfusion_jax.models.store import open_converted, write_converted
from causalfusion_jax.prepare.exported import Exported, from_metadata
from causalfusion_jax.sampling import released
from causalfusion_jax.sampling.trained import from_converted, from_run
from causalfusion_jax.training.state import abstract_state

NOT_GIVEN = dict(patch_size=None, image_size=None, frames=None, block_size=None)
MOVING = dict(
    data=dict(source="moving_digits", image_size=16, frames=4),
    model=ACDIT | dict(hidden=32, heads=1, layers=2, patch_size=8),
    factorization=dict(order="raster", steps="block", block_size=4, weight="linear"),
    diffusion=dict(target="v", t_shared_by="step"),
    sampling=dict(solver="dpmpp_2m", ar_steps=4, cfg_scale=1.5),
)
DIGITS = dict(diffusion=dict(target="v"), sampling=dict(ar_steps=4, clip_x_0=1.0))


def random_run(workdir, sections, names=()):
    """A run of random weights at step 7, as training leaves it."""
    config, rng = experiment.from_dict(tiny_config(**sections)), np.random.default_rng(0)
    claim_workdir(str(workdir), config)
    store_class_names(workdir, names)
    wanted = abstract_state(config.step, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype)), wanted)
    checkpoints = Checkpoints(str(workdir), config.checkpoint.keep, config.checkpoint.keep_every)
    checkpoints.save(7, state, 0)
    checkpoints.close()
    return from_run(str(workdir))


def imported(file, folder, **given):
    """The transformer that an exported file is imported as."""
    read = released.read_released(file, given.pop("kind", None), given.pop("weights", None), NOT_GIVEN | given)
    write_converted(folder, read.kind, read.settings, read.source, read.params, read.class_names)
    return from_converted(str(folder))


@pytest.mark.parametrize(("sections", "kind"), [(DIGITS, "causalfusion"), (MOVING, "acdit")], ids=["image", "video"])
def test_a_run_comes_back_whole(tmp_path, sections, kind):
    names = tuple("abcdefghij")
    trained = random_run(tmp_path / "run", sections, names)
    file = tmp_path / "run.safetensors"
    assert released.write_exported(str(tmp_path / "run"), file).metadata.kind == kind
    with safe_open(file, "numpy") as opened:
        assert {"step": "7", "weights": "ema", "kind": kind}.items() <= opened.metadata().items()
    back = imported(file, tmp_path / "back")
    assert back.config == trained.config and back.class_names == names
    assert back.description == f"ema of step 7 of run.safetensors in {tmp_path / 'back'}"
    ours, theirs = trained.params(), back.params()
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), ours, theirs))
    # An imported checkpoint exports to the same file.
    released.write_exported(str(tmp_path / "back"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    # The weights of the last step, by either of their names.
    for weights in ("params", None):
        chosen = released.write_exported(
            str(tmp_path / "run"), tmp_path / f"{weights}.safetensors", weights=weights, step=7
        )
        assert (chosen.metadata.weights, chosen.metadata.step) == ("model" if weights else "ema", 7)
    with pytest.raises(InputError, match="step=8: must be one of"):
        released.write_exported(str(tmp_path / "run"), tmp_path / "none.safetensors", step=8)
    with pytest.raises(InputError, match="step=7: a converted checkpoint has one set of weights"):
        released.write_exported(str(tmp_path / "back"), tmp_path / "none.safetensors", step=7)
    refused = {
        "kind": "acdit" if kind == "causalfusion" else "causalfusion",
        "weights": "model",
        "patch_size": 1,
        "image_size": 4,
        "frames": 2,
        "block_size": 2,
    }
    for name, value in refused.items():
        with pytest.raises(InputError, match=f"--{name}=.*leave it out"):
            imported(file, tmp_path / "other", **{name: value})
    # Flags that agree with the file are accepted.
    imported(file, tmp_path / "same", kind=kind, weights="ema", patch_size=trained.config.model.patch_size)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (dict(data=dict(source="digit_pairs", image_width=16, num_classes=100), text=dict(tokenizer="bytes")), "texts"),
        (dict(model=DIT, factorization=dict(order="raster", steps="fixed", weight="none")), "released format of acdit"),
    ],
    ids=["text", "plain DiT"],
)
def test_what_no_released_format_holds_is_refused(tmp_path, sections, words):
    random_run(tmp_path / "run", sections)
    with pytest.raises(InputError, match=words):
        released.write_exported(str(tmp_path / "run"), tmp_path / "run.safetensors")
    assert not (tmp_path / "run.safetensors").exists()


def test_settings_of_an_autoencoder_that_no_shape_tells_come_back(tmp_path):
    config = dataclasses.replace(TINY_VAE, scaling_factor=0.125, norm_groups=2)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_autoencoder(config)[1])
    write_converted(tmp_path / "vae", "mar_vae", dataclasses.asdict(config), {"file": "vae.ckpt"}, params)
    released.write_exported(str(tmp_path / "vae"), tmp_path / "vae.safetensors")
    read = released.read_released(tmp_path / "vae.safetensors", None, None, NOT_GIVEN)
    kept = open_converted("--vae", str(tmp_path / "vae"), ("mar_vae",)).settings
    assert read.kind == "mar_vae" and read.settings == kept and kept["scaling_factor"] == 0.125


def test_metadata_of_others_and_damaged_metadata():
    whole = Exported("acdit", {"a": [1]}, ("x", "y"), "model", 3)
    assert from_metadata(whole.to_metadata()) == whole
    least = Exported("mar_vae", {})
    assert from_metadata(least.to_metadata()) == least
    for others in ({}, {"format": "pt"}, {"kind": "x"}, {"settings": {}, "kind": "acdit"}):
        assert from_metadata(others) is None
    for damage in ({"settings": "{"}, {"settings": "[]"}, {"step": "x"}, {"class_names": json.dumps([1])}):
        with pytest.raises(InputError, match="__metadata__"):
            from_metadata(whole.to_metadata() | damage)
