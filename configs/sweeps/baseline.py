"""CausalFusion's ablation from the DiT to its in-context baseline, with one AR step.

The paper's FID-10k: DiT 18.24 -> without adaLN 26.71 -> new recipe 21.94 -> timestep added to
the tokens 20.68 -> qk-norm 18.66 -> learning rate warm-up 17.11 -> all 13.78. In-context
conditioning always adds the timestep to the tokens here, so the sweep covers the other steps.
On ImageNet the DiT's recipe is batch 256 and learning rate 1e-4, the new one 2048 and 8e-4, for
the same number of epochs; digits have one recipe.

    python launch/sweep.py --sweep=configs/sweeps/baseline.py:digits --workdir=sweeps/baseline
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.models.presets import DIT
from causalfusion_jax.sweeps.sweep import Sweep

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}
OLD_RECIPE = {
    "digits": {},
    "imagenet": {"train.batch_size": 256, "train.steps": 240 * 1_281_167 // 256, "optimizer.learning_rate": 1e-4},
}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    old, no_warmup, no_norm = OLD_RECIPE[data], {"optimizer.warmup_steps": 0}, {"model.qk_norm": False}
    dit = {f"model.{name}": value for name, value in DIT.items()}
    without_adaln = ({**old, **no_norm, **no_warmup},) if old else ()
    return Sweep(
        config=CONFIGS[data],
        overrides=({**dit, **old, **no_warmup}, *without_adaln, {**no_norm, **no_warmup}, no_warmup, no_norm, {}),
        fixed={
            "factorization.steps": "fixed",
            "factorization.num_steps": 1,
            "factorization.weight": "none",
            "logging.sample_every": 0,
        },
        ar_steps=(1,),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
