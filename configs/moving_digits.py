"""ACDiT on clips of scikit-learn's digits that move and bounce: real pixels, no download, trained in minutes.

16 frames of 16x16 grey pixels, patch 8: 64 tokens of 64 values, 4 blocks of 4 frames.

| hidden | heads | layers | parameters |
|---|---|---|---|
| 192 | 3 | 4 | 2.9M |

    python -m causalfusion_jax.train --config=configs/moving_digits.py --workdir=runs/moving_digits
    python -m causalfusion_jax.sample --workdir=runs/moving_digits --frames=64 --out=runs/moving_digits/samples_64
"""

from causalfusion_jax.config.experiment import default_config
from causalfusion_jax.models.presets import ACDIT, preset


def get_config():
    """Settings of the run."""
    config = default_config()
    config.data.update(source="moving_digits", image_size=16, frames=16)
    config.model.update(**preset("nano") | ACDIT | dict(hidden=192, patch_size=8))
    # The first block has no context and takes longest to learn: its loss has the largest weight.
    config.factorization.update(order="raster", steps="block", block_size=16, weight="linear", weight_max=4.0)
    # On pixels, v gives an error of x_0 that is uniform over noise levels; eps is the paper's target for latents.
    config.diffusion.update(target="v", t_shared_by="step")
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, schedule="wsd", decay_fraction=0.4)
    config.train.update(steps=7200, batch_size=8, ema_decay=0.999)
    config.checkpoint.every = 500
    config.logging.update(every=100, sample_every=2000, num_samples=10)
    config.sampling.update(solver="dpmpp_2m", solver_steps=25, ar_steps=4, cfg_scale=1.5)
    return config
