"""CausalFusion's ablation of the AR loss weight, which falls linearly from weight_max to 1.

The paper chose 2 (FID-10k 12.13, 15.15 and 18.09 at 1, 2 and 4 AR steps).

    python launch/sweep.py --sweep=configs/sweeps/ar_weight.py:digits --workdir=sweeps/ar_weight
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    return Sweep(
        config=CONFIGS[data],
        # A weight from 1 to 1 is no weight, as in the paper's earlier ablations.
        overrides=chain(
            grid({"factorization.weight": ["none"]}), grid({"factorization.weight_max": [1.5, 2.0, 2.5, 3.0]})
        ),
        fixed={"logging.sample_every": 0},
        ar_steps=(1, 2, 4),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
