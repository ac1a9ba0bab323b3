"""ACDiT on UCF-101 video latents, 16 frames at 256x256 (arXiv 2412.07720).

| argument | hidden | heads | layers | parameters |
|---|---|---|---|---|
| XL | 1152 | 18 | 28 | 673.8M |
| H | 1280 | 20 | 32 | 949.8M |

16 frames of 32x32 latents of the SD VAE, patch 2: 4096 tokens, 4 blocks of 4 frames. UCF-101 is read
from TFDS (set data.path to its data_dir if that is not the default); the middle 16 frames of every
video are encoded once with the converted VAE:

    python -m causalfusion_jax.encode --config=configs/ucf101_acdit.py:XL --config.data.source=tfds \
        --config.data.workers=16 --batch_size=16 --records_per_shard=512 --vae=VAE --out=LATENTS
    python -m causalfusion_jax.train --config=configs/ucf101_acdit.py:XL \
        --config.data.path=LATENTS --workdir=runs/ucf101_acdit_xl

Folders of video files, one for each class, can be encoded instead: source=clip_folder, path=ROOT, and
frame_stride=2 for every second frame. For more clips of a video: `data.source=arrays` with data.path=DATA,
DATA/image.npy [clips, 16, 32, 32, 4] (latents times 0.18215) and DATA/label.npy.
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.models.presets import ACDIT, preset


def get_config(arg: str = "XL"):
    """Settings of the run; `arg` is the size."""
    (size,) = choose(arg, size=("XL", "H"))
    config = default_config()
    config.data.update(
        source="latents", name="ucf101", latents=True, num_classes=101, channels=4, image_size=32, frames=16
    )
    config.model.update(**preset(f"acdit_{size}"), **ACDIT, patch_size=2, dtype="bfloat16")
    config.factorization.update(order="raster", steps="block", block_size=1024, weight="none")
    config.diffusion.t_shared_by = "step"
    config.train.update(steps=400_000, batch_size=96)
    config.optimizer.update(learning_rate=3e-4, schedule="wsd", decay_fraction=0.15)
    config.checkpoint.update(every=2500, keep_every=50_000)
    config.logging.update(sample_every=10_000, num_samples=8)
    config.sampling.update(solver="dpmpp_2m", solver_steps=25, ar_steps=4, cfg_scale=2.5)
    # A video has 4096 tokens: the batch size of training.
    config.finetune.batch_size = config.train.batch_size
    config.mesh.preset = "fsdp"
    return config
