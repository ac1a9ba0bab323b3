"""ACDiT on clips of scikit-learn's digits that move and bounce: real pixels, no download, minutes.

16 frames of 16x16 grey pixels, patch 4: 256 tokens of 16 values, 4 blocks of 4 frames.

| hidden | heads | layers | parameters |
|---|---|---|---|
| 96 | 3 | 4 | 0.7M |

    python -m causalfusion_jax.train --config=configs/moving_digits.py --workdir=runs/moving_digits
    python -m causalfusion_jax.sample --workdir=runs/moving_digits --frames=64 --out=runs/moving_digits/samples_64
"""

from causalfusion_jax.experiment import default_config
from causalfusion_jax.models.presets import ACDIT, preset


def get_config():
    """Settings of the run."""
    config = default_config()
    config.data.update(source="moving_digits", image_size=16, frames=16)
    config.model.update(**preset("nano"), **ACDIT, patch_size=4)
    config.factorization.update(order="raster", steps="block", block_size=64, weight="none")
    # On pixels v keeps the error of x_0 even over noise levels; eps is the paper's target, for latents.
    config.diffusion.update(target="v", t_shared_by="step")
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, schedule="wsd", decay_fraction=0.4)
    config.train.update(steps=2400, batch_size=16, ema_decay=0.999)
    config.checkpoint.every = 500
    config.logging.update(every=50, sample_every=1000, num_samples=10)
    config.sampling.update(solver="dpmpp_2m", solver_steps=25, ar_steps=4, cfg_scale=1.5)
    return config
