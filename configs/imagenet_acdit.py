"""ACDiT on ImageNet latents at 256x256 (arXiv 2412.07720).

| argument | hidden | heads | layers | parameters |
|---|---|---|---|---|
| B | 768 | 12 | 12 | 130.3M |
| L | 1024 | 16 | 24 | 457.9M |
| XL | 1152 | 18 | 28 | 674.9M |
| H | 1280 | 20 | 32 | 951.0M |

32x32 latents of the SD VAE, patch 1: 4 square blocks of 256 tokens. ImageNet is read from TFDS
(set data.path to its data_dir if that is not the default) and encoded once with the converted VAE:

    python -m causalfusion_jax.encode --config=configs/imagenet_acdit.py:XL \
        --config.data.source=tfds --config.data.workers=16 --vae=VAE --out=LATENTS
    python -m causalfusion_jax.train --config=configs/imagenet_acdit.py:XL \
        --config.data.path=LATENTS --workdir=runs/imagenet_acdit_xl
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.config.probe import IMAGENET_LINEAR
from causalfusion_jax.models.presets import ACDIT, preset


def get_config(arg: str = "XL"):
    """Settings of the run; `arg` is the size."""
    (size,) = choose(arg, size=("XL", "B", "L", "H"))
    config = default_config()
    config.data.update(
        source="latents", name="imagenet2012", latents=True, flip=True, num_classes=1000, channels=4, image_size=32
    )
    config.model.update(**preset(f"acdit_{size}"), **ACDIT, patch_size=1, dtype="bfloat16")
    config.factorization.update(order="square_blocks", order_block=256, steps="block", block_size=256, weight="none")
    config.diffusion.t_shared_by = "step"
    config.train.update(steps=1_200_000, batch_size=1024)
    config.optimizer.update(learning_rate=3e-4, schedule="wsd", decay_fraction=0.15)
    config.checkpoint.update(every=2500, keep_every=100_000)
    config.logging.sample_every = 10_000
    config.evaluation.update(metric="fid", num_images=10_000)
    config.probe.update(IMAGENET_LINEAR)
    config.sampling.update(solver="dpmpp_2m", solver_steps=25, ar_steps=4, cfg_scale=1.5)
    config.mesh.preset = "fsdp"
    return config
