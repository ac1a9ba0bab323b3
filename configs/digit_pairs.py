"""Texts and images in one model: pairs of real digits with captions, on a CPU.

8x16 grey images, patch 2: 32 tokens of 4 values; captions such as "three seven", as bytes.

| argument | model |
|---|---|
| (none) | CausalFusion: random order, AR steps drawn for every image |
| transfusion | Transfusion: the image is one AR step of noisy tokens, captioned at a small noise level |

    python -m causalfusion_jax.train --config=configs/digit_pairs.py --workdir=runs/pairs
    python -m causalfusion_jax.sample --workdir=runs/pairs --prompt="three seven" --out=runs/pairs/three_seven
    python -m causalfusion_jax.caption --workdir=runs/pairs --images=held_out --num=500 --out=runs/pairs/captions
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.models.presets import preset


def get_config(arg: str = ""):
    """Settings of the run; `arg` is the model."""
    (model,) = choose(arg, model=("causalfusion", "transfusion"))
    config = default_config()
    config.data.update(source="digit_pairs", image_size=8, image_width=16, num_classes=100)
    config.text.update(tokenizer="bytes", max_tokens=13)
    config.joint.read_noise = 0.1
    config.model.update(preset("nano"), class_dropout=1.0)
    # On pixels, v gives an error of x_0 that is uniform over noise levels.
    config.diffusion.target = "v"
    config.optimizer.update(learning_rate=2.5e-3, warmup_steps=200, schedule="wsd", decay_fraction=0.4)
    config.train.update(steps=3000, batch_size=48)
    config.checkpoint.every = 500
    config.logging.update(every=50, sample_every=0)
    config.evaluation.metric = "accuracy"
    config.sampling.update(ar_steps=4, cfg_scale=1.5)
    if model == "transfusion":
        config.factorization.update(order="raster", steps="fixed", num_steps=1, weight="none")
        config.joint.update(image_tokens="noisy", read_noise=0.5)
        config.sampling.ar_steps = 1
    return config
