"""CausalFusion on ImageNet latents (arXiv 2412.12095).

| argument | hidden | heads | layers | parameters (system, 256) |
|---|---|---|---|---|
| L | 1024 | 16 | 24 | 369.5M |
| XL | 1280 | 20 | 32 | 714.0M |
| H | 1408 | 22 | 48 | 1235.6M |

- `system` (default): latents of the MAR VAE (16x, 16 channels), patch 1, 64 condition tokens,
  learned positions, 800 epochs.
- `ablation`: latents of the SD VAE (8x, 4 channels), patch 2, 4 condition tokens, fixed sines
  and cosines, 240 epochs.
- `256` (default) or `512`: height and width in pixels.

ImageNet is read from TFDS (set data.path to its data_dir if that is not the default) and encoded once;
VAE is the converted autoencoder:

    python -m causalfusion_jax.encode --config=configs/imagenet_causalfusion.py:XL,system,256 \
        --config.data.source=tfds --config.data.workers=16 --vae=VAE --out=LATENTS
    python -m causalfusion_jax.train --config=configs/imagenet_causalfusion.py:XL,system,256 \
        --config.data.path=LATENTS --workdir=runs/imagenet_xl

`data.source=image_folder` or `tar` encode a folder of images or tar shards instead;
`data.source=arrays` with `data.flip=False` trains on image.npy (scaled latents) and label.npy.
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.config.probe import IMAGENET_LINEAR
from causalfusion_jax.models.presets import preset

IMAGES = 1_281_167
WARMUP_EPOCHS = 40


def get_config(arg: str = "L"):
    """Settings of the run; `arg` is SIZE[,ablation|system][,256|512]."""
    size, setting, pixels = choose(arg, size=("L", "XL", "H"), setting=("system", "ablation"), pixels=("256", "512"))
    system = setting == "system"
    config = default_config()
    config.data.update(
        source="latents",
        name="imagenet2012",
        latents=True,
        flip=True,
        num_classes=1000,
        channels=16 if system else 4,
        image_size=int(pixels) // (16 if system else 8),
    )
    config.model.update(
        **preset(size),
        patch_size=1 if system else 2,
        num_condition_tokens=64 if system else 4,
        positions="learned" if system else "sincos",
        dtype="bfloat16",
    )
    # The factorizations are the defaults: random order, decay 0.9, weight 2 to 1; eps, linear betas, one t per image.
    config.train.batch_size = 2048
    config.train.steps = (800 if system else 240) * IMAGES // config.train.batch_size
    config.optimizer.learning_rate = 8e-4
    config.optimizer.warmup_steps = WARMUP_EPOCHS * IMAGES // config.train.batch_size
    config.checkpoint.update(every=2500, keep_every=50_000)
    config.logging.sample_every = 10_000
    config.evaluation.update(metric="fid", num_images=10_000)
    config.probe.update(IMAGENET_LINEAR)
    config.sampling.update(solver="ddpm", solver_steps=250, variance="large", ar_steps=1)
    config.mesh.preset = "fsdp"
    return config
