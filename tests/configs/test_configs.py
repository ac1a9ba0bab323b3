"""The configs of the papers: built, counted, their training step traced."""

import functools
import importlib.util

import jax
import pytest
from helpers import ROOT

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.models.transformer import count_params
from causalfusion_jax.training.state import init_state, train_step

CASES = {
    # config: millions of parameters, tokens, condition tokens, images or clips a step, steps
    "imagenet_causalfusion:L": (369.5, 256, 64, 2048, 500_455),
    "imagenet_causalfusion:XL": (714.0, 256, 64, 2048, 500_455),
    "imagenet_causalfusion:H,system,256": (1235.6, 256, 64, 2048, 500_455),
    "imagenet_causalfusion:512,XL": (715.0, 1024, 64, 2048, 500_455),
    "imagenet_causalfusion:L,ablation": (307.7, 256, 4, 2048, 150_136),
    "imagenet_acdit:B": (130.3, 1024, 0, 1024, 1_200_000),
    "imagenet_acdit:L": (457.9, 1024, 0, 1024, 1_200_000),
    "imagenet_acdit:XL": (674.9, 1024, 0, 1024, 1_200_000),
    "imagenet_acdit:H": (951.0, 1024, 0, 1024, 1_200_000),
    "ucf101_acdit:XL": (673.8, 4096, 0, 96, 400_000),
    "ucf101_acdit:H": (949.8, 4096, 0, 96, 400_000),
    "imagenet_dit:L": (457.8, 256, 0, 256, 1_201_094),
    "imagenet_dit:XL,adaln": (674.8, 256, 0, 256, 1_201_094),
    "imagenet_dit:L,in_context": (307.7, 256, 4, 2048, 150_136),
    "moving_digits": (2.9, 64, 0, 8, 7200),
    "digits": (0.5, 16, 4, 48, 2300),
    "digits:acdit": (0.7, 16, 0, 48, 2300),
    "digits:dit": (0.7, 16, 0, 48, 2300),
    "digits:short": (0.2, 16, 4, 48, 300),
    "digits:acdit,short": (0.3, 16, 0, 48, 900),
    "digit_pairs": (0.6, 32, 4, 48, 3000),
    "digit_pairs:transfusion": (0.6, 32, 4, 48, 3000),
}


def load(name):
    """A config as `--config=configs/NAME.py:ARG` gives it."""
    file, _, arg = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return experiment.from_dict((module.get_config(arg) if arg else module.get_config()).to_dict())


@pytest.mark.parametrize("name", CASES)
def test_config_is_built_counted_and_traced(name):
    millions, tokens, condition_tokens, batch, steps = CASES[name]
    config = load(name)
    model = config.transformer
    assert round(count_params(model) / 1e6, 1) == millions
    assert (model.num_tokens, model.num_condition_tokens) == (tokens, condition_tokens)
    assert (config.train.batch_size, config.train.steps) == (batch, steps)
    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(init_state, config.step), key)
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in config.batch_shapes.items()}
    after, metrics = jax.eval_shape(functools.partial(train_step, config.step), state, arrays, key)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["loss"].shape == ()


def test_every_config_has_a_case():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {name.partition(":")[0] for name in CASES}


@pytest.mark.parametrize(
    ("name", "word"),
    [("imagenet_acdit:XXL", "did you mean XL"), ("imagenet_dit:L,XL", "already"), ("digits:acdti", "mean acdit")],
)
def test_wrong_argument(name, word):
    with pytest.raises(InputError, match=word):
        load(name)
