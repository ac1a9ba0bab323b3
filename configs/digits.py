"""CausalFusion on scikit-learn's handwritten digits: real data, no download, minutes.

8x8 grey images, patch 2: 16 tokens of 4 values, 4 condition tokens.

| argument | hidden | heads | layers | parameters |
|---|---|---|---|---|
| (none) | 96 | 3 | 4 | 0.5M |

    python -m causalfusion_jax.train --config=configs/digits.py --workdir=runs/digits
"""

from causalfusion_jax.experiment import default_config
from causalfusion_jax.models.presets import preset


def get_config(arg: str = ""):
    """Settings of the run; `arg` is unused."""
    config = default_config()
    config.model.update(preset("nano"))
    # On pixels v keeps the error of x_0 even over noise levels; eps is the papers' target, for latents.
    config.diffusion.target = "v"
    config.optimizer.learning_rate = 2.5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.train.steps = 2300
    config.train.batch_size = 48
    config.checkpoint.every = 250
    config.logging.every = 50
    config.logging.sample_every = 500
    config.sampling.ar_steps = 4
    return config
