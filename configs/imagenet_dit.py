"""The baselines: diffusion transformers of one AR step on ImageNet latents at 256x256.

| argument | hidden | heads | layers | parameters adaln | in_context |
|---|---|---|---|---|---|
| S | 384 | 6 | 12 | 32.9M | 23.1M |
| B | 768 | 12 | 12 | 130.3M | 88.9M |
| L | 1024 | 16 | 24 | 457.8M | 307.7M |
| XL | 1152 | 16 | 28 | 674.8M | 452.5M |

- `adaln` (default): the plain DiT, adaLN-zero, no qk-norm, batch 256, learning rate 1e-4.
- `in_context`: the in-context DiT that CausalFusion starts from (its Table 1, last row):
  4 condition tokens, the timestep added to the tokens, qk-norm, warm-up, batch 2048.

32x32 latents of the SD VAE, patch 2, fixed sines and cosines. ImageNet is read from TFDS (set data.path to
its data_dir if that is not the default) and encoded once with the converted VAE:

    python -m causalfusion_jax.encode --config=configs/imagenet_dit.py:L,adaln \
        --config.data.source=tfds --config.data.workers=16 --vae=VAE --out=LATENTS
    python -m causalfusion_jax.train --config=configs/imagenet_dit.py:L,adaln \
        --config.data.path=LATENTS --workdir=runs/imagenet_dit_l
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.config.probe import IMAGENET_LINEAR
from causalfusion_jax.models.presets import DIT, preset

SIZES = {"S": preset("S"), "B": preset("B"), "L": preset("L"), "XL": dict(hidden=1152, heads=16, layers=28)}
IMAGES = 1_281_167


def get_config(arg: str = "L"):
    """Settings of the run; `arg` is SIZE[,adaln|in_context]."""
    size, conditioning = choose(arg, size=("L", "S", "B", "XL"), conditioning=("adaln", "in_context"))
    config = default_config()
    config.data.update(
        source="latents", name="imagenet2012", latents=True, flip=True, num_classes=1000, channels=4, image_size=32
    )
    config.model.update(**SIZES[size], patch_size=2, dtype="bfloat16")
    # With one AR step the token order only permutes the sequence.
    config.factorization.update(order="raster", steps="fixed", num_steps=1, weight="none")
    if conditioning == "adaln":
        config.model.update(**DIT)
        config.train.batch_size = 256
        config.optimizer.learning_rate = 1e-4
    else:
        config.model.update(positions="sincos", num_condition_tokens=4)
        config.train.batch_size = 2048
        config.optimizer.learning_rate = 8e-4
        config.optimizer.warmup_steps = 40 * IMAGES // config.train.batch_size
    config.train.steps = 240 * IMAGES // config.train.batch_size
    config.checkpoint.update(every=2500, keep_every=50_000)
    config.logging.sample_every = 10_000
    config.evaluation.update(metric="fid", num_images=10_000)
    config.probe.update(IMAGENET_LINEAR)
    config.sampling.update(solver="ddpm", solver_steps=250, variance="large", ar_steps=1)
    config.mesh.preset = "fsdp"
    return config
