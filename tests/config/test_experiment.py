"""Settings: combinations of both papers, and the reasons for refused ones."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_config
from tiny_data import write_tokenizer

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.config.workdir import claim_workdir, load_config
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.tokenizers import make_tokenizer
from causalfusion_jax.models.presets import ACDIT, DIT
from causalfusion_jax.sampling.sampler import SamplingSpec, generate, image_keys
from causalfusion_jax.training.state import init_state, train_step

BLOCKS = dict(order="square_blocks", order_block=4, steps="block", block_size=4, weight="none")
FLOW = dict(schedule="flow", target="velocity")
LATENT_VIDEO = dict(source="arrays", latents=True, image_size=4, channels=4, frames=3, num_classes=5)


@pytest.mark.parametrize(
    "sections",
    [
        dict(factorization=BLOCKS, diffusion=dict(t_shared_by="step")),
        dict(model=dict(positions="rope", norm="rms"), factorization=BLOCKS),
        dict(model=ACDIT, factorization=dict(order="random", steps="decay"), diffusion=FLOW | dict(t_shared_by="token"),
             sampling=dict(solver="heun", cfg_scale=2.0)),
        dict(model=ACDIT, factorization=dict(steps="uniform", order="dilated", order_block=2),
             diffusion=dict(schedule="cosine", target="x_0", t_shared_by="step"),
             sampling=dict(solver="ddim", eta=0.3, ar_steps=3, cfg_scale=1.5)),
        dict(model=DIT, factorization=dict(order="raster", steps="fixed", weight="none")),
        dict(model=DIT | dict(positions="learned", qk_norm=True), diffusion=dict(target="v"),
             sampling=dict(solver="dpmpp_2m", ar_steps=16)),
        dict(model=ACDIT, data=LATENT_VIDEO, factorization=dict(order="raster", steps="block", block_size=4)),
        dict(model=dict(positions="sincos"), data=LATENT_VIDEO,
             factorization=dict(order="block_raster", order_block=2, steps="fixed", num_steps=5)),
    ],
    ids=["in_context blocks", "in_context rope", "adaln random flow", "adaln dilated cosine", "dit", "dit dpmpp",
         "video blocks", "video in_context"],
)  # fmt: skip
def test_papers_combine(sections):
    config = experiment.from_dict(tiny_config(**sections))
    key, model = jax.random.key(0), config.transformer
    state = jax.eval_shape(functools.partial(init_state, config.step), key)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in config.batch_shapes.items()}
    after, _ = jax.eval_shape(functools.partial(train_step, config.step), state, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    run = functools.partial(generate, SamplingSpec(model, config.diffusion, config.factorization, config.sampling))
    out = jax.eval_shape(run, state.params, image_keys(0, range(2)), Condition(jnp.zeros(2, jnp.int32)))
    assert out.shape == (2, model.num_tokens, model.token_dim)


def test_run_keeps_the_checksum_of_its_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, "three", "seven")
    config = experiment.from_dict(tiny_config(text=dict(tokenizer="huggingface", path=str(path), max_tokens=4)))
    for _ in range(2):
        claim_workdir(str(tmp_path / "run"), config)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["text"]
    assert kept["checksum"] == files.describe_file(path)["sha256"]
    assert load_config(str(tmp_path / "run")).text.checksum == kept["checksum"]
    write_tokenizer(path, "seven", "three")
    make_tokenizer.cache_clear()
    for use in (load_config, lambda workdir: claim_workdir(workdir, config)):
        with pytest.raises(InputError, match="is another file than the run began with"):
            use(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("sections", "field", "reason"),
    [
        (dict(model=dict(conditioning="adaln")), "config.model.num_condition_tokens", "has no condition tokens"),
        (dict(model=dict(class_dropout=0.0), sampling=dict(cfg_scale=2.0)), "config.sampling.cfg_scale", "guide away"),
        (dict(model=dict(positions="rope", heads=16)), "config.model.heads", "multiple of 4"),
        (dict(model=dict(positions="table")), "config.model.positions", "learned, sincos, rope"),
        (dict(factorization=dict(steps="block", block_size=5)), "config.factorization.block_size", "divide the 16"),
        (dict(factorization=BLOCKS | dict(order_block=8)), "config.factorization.order_block", "square number"),
        (dict(diffusion=dict(schedule="flow")), "config.diffusion.target", "cannot recover x_0"),
        (dict(sampling=dict(solver="euler")), "config.sampling.solver", "integrates the flow"),
        (dict(data=dict(frames=4)), "config.data.frames", "for source digits"),
        (dict(data=LATENT_VIDEO | dict(flip=True)), "config.data.flip", "encode flipped images"),
        (dict(data=LATENT_VIDEO | dict(latents=False)), "config.data.channels", "1, 3"),
    ],
)
def test_invalid_settings_are_refused_with_the_reason(sections, field, reason):
    with pytest.raises(InputError) as error:
        experiment.from_dict(tiny_config(**sections))
    assert error.value.field == field and reason in str(error.value)


def test_sampler_settings_that_depend_on_others_are_reset():
    run = SamplerConfig(
        solver="ddim", eta=0.5, temperature=0.9, order="dilated", order_block=2, step_sizes=(4, 12), solver_steps=9
    )
    assert run.updated({}) == run.updated({"solver": "ddim"}) == run
    assert run.updated({"solver": "ddpm"}) == dataclasses.replace(run, solver="ddpm", eta=0.0, temperature=1.0)
    assert run.updated({"solver": "ddpm", "temperature": 0.8}).temperature == 0.8
    assert run.updated({"order": "raster"}) == dataclasses.replace(run, order="raster", order_block=0)
    assert run.updated({"ar_steps": 4}) == dataclasses.replace(run, ar_steps=4, step_sizes=())
    with pytest.raises(InputError, match="step_sizes=.*leave out ar_steps"):
        run.updated({"ar_steps": 4, "step_sizes": (8, 8)})


def test_sampler_settings_are_written_as_stored_runs_have_them():
    """Evaluations of earlier versions store these settings as text; another text resets the best checkpoint."""
    assert repr(SamplerConfig(ar_steps=4)) == (
        "SamplerConfig(ar_steps=4, step_sizes=(), order='', order_block=0, solver='ddpm', solver_steps=50, "
        "spacing='auto', variance='large', eta=0.0, cfg_scale=1.0, cfg_schedule='constant', cfg_interval=(0.0, inf), "
        "temperature=1.0, clip_x_0=0.0)"
    )
