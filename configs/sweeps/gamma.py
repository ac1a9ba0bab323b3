"""CausalFusion's ablation of gamma, the decay of P(S = i) over the number of AR steps.

The paper chose 0.9 (FID-10k 12.89, 15.57, 18.83 and 22.72 at 1, 2, 4 and 8 AR steps).

    python launch/sweep.py --sweep=configs/sweeps/gamma.py:digits --workdir=sweeps/gamma
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, grid

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    return Sweep(
        config=CONFIGS[data],
        overrides=grid({"factorization.gamma": [1.0, 0.95, 0.9, 0.85, 0.8]}),
        fixed={"factorization.weight": "none", "logging.sample_every": 0},
        ar_steps=(1, 2, 4, 8),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
