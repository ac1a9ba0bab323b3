"""Eight quick runs on digits: the effect of each part of CausalFusion's recipe.

Every combination of two decays of the number of AR steps and two AR loss weights, then the order, fixed
AR steps and the condition tokens, one at a time.

    python launch/sweep.py --sweep=configs/sweeps/digits_ablation.py --workdir=sweeps/digits_ablation
"""

from causalfusion_jax.common.errors import require
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid, together


def get_sweep(arg: str = ""):
    """The sweep; takes no argument."""
    require(not arg, "arg", arg, "must be left out")
    return Sweep(
        config="configs/digits.py",
        overrides=chain(
            grid({"factorization.gamma": [1.0, 0.9], "factorization.weight_max": [1.0, 2.0]}),
            grid({"factorization.order": ["raster"]}),
            together({"factorization.steps": ["fixed", "fixed"], "factorization.num_steps": [1, 16]}),
            grid({"model.num_condition_tokens": [16]}),
        ),
        # A fifth of the recipe is enough to distinguish the runs.
        fixed={"train.steps": 450, "optimizer.warmup_steps": 50, "checkpoint.every": 150, "logging.sample_every": 0},
        ar_steps=(1, 4, 16),
        num_samples=500,
    )
