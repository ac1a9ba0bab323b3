"""Both papers' models on scikit-learn's handwritten digits: real data, no download, trained in minutes.

8x8 grey images, patch 2: 16 tokens of 4 values.

| argument | model | hidden | heads | layers | parameters |
|---|---|---|---|---|---|
| (none) | CausalFusion: random order, AR steps drawn for every image, 4 condition tokens | 96 | 3 | 4 | 0.5M |
| acdit | ACDiT: 4 square blocks of 4 tokens, adaLN-zero, rotary positions | 96 | 3 | 4 | 0.7M |
| dit | plain DiT, the baseline of both: one AR step, only noisy tokens, adaLN-zero | 96 | 3 | 4 | 0.7M |
| short | CausalFusion for 300 steps, sampled at 15 noise levels | 64 | 2 | 3 | 0.2M |
| acdit,short | ACDiT for 900 steps, likewise | 64 | 2 | 3 | 0.3M |

    python -m causalfusion_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m causalfusion_jax.train --config=configs/digits.py:acdit --workdir=runs/digits_acdit
    python -m causalfusion_jax.probe --kind=linear --workdir=runs/digits
"""

from causalfusion_jax.config.experiment import choose, default_config
from causalfusion_jax.models.presets import ACDIT, DIT, preset


def get_config(arg: str = ""):
    """Settings of the run; `arg` is [causalfusion|acdit|dit][,short]."""
    model, length = choose(arg, model=("causalfusion", "acdit", "dit"), length=("full", "short"))
    config = default_config()
    config.model.update(preset("nano"))
    # On pixels, v gives an error of x_0 that is uniform over noise levels; eps is the papers' target for latents.
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
    # Few steps suffice for a linear classifier of 900 images; chosen by cross-validation on the training half.
    config.probe.update(learning_rate=0.1, weight_decay=0.1)
    # Digits must not be flipped; they are shifted by a pixel.
    config.finetune.update(epochs=100, batch_size=128, learning_rate=2e-3, shift=1, checkpoint_epochs=25)
    if model == "acdit":
        config.model.update(**ACDIT)
        config.factorization.update(order="square_blocks", order_block=4, steps="block", block_size=4, weight="none")
        config.diffusion.t_shared_by = "step"
        config.sampling.cfg_scale = 1.5  # as ACDiT samples images
    if model == "dit":
        config.model.update(**DIT)
        config.factorization.update(order="raster", steps="fixed", num_steps=1, weight="none")
        config.sampling.ar_steps = 1
    if length == "short":
        # launch/tables trains about 90 of these runs: all tables in about an hour on two cores.
        config.model.update(hidden=64, heads=2, layers=3)
        config.optimizer.warmup_steps = 50
        # adaLN, whose gates are initialized to zero, takes longer to learn the classes.
        config.train.steps = config.checkpoint.every = 300 if model == "causalfusion" else 900
        config.logging.update(every=100, sample_every=0)
        config.sampling.update(solver="dpmpp_2m", solver_steps=15, cfg_scale=1.0)
    return config
