"""CausalFusion's ablation of the number of AR steps in training: a fixed S, or a random one.

The paper's result (FID-10k, ImageNet): a fixed S is good only at that S; a random S is never the
best and never bad.

    python launch/sweep.py --sweep=configs/sweeps/fixed_steps.py:digits --workdir=sweeps/fixed_steps
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid, product

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}
TOKENS = {"digits": 16, "imagenet": 256}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    return Sweep(
        config=CONFIGS[data],
        overrides=chain(
            product(
                grid({"factorization.steps": ["fixed"]}), grid({"factorization.num_steps": [1, 2, 4, 8, TOKENS[data]]})
            ),
            # Drawn uniformly from 1..L.
            grid({"factorization.gamma": [1.0]}),
        ),
        # Among the paper's ablations, only those of weights and condition tokens weight AR steps.
        fixed={"factorization.weight": "none", "logging.sample_every": 0},
        ar_steps=(1, 2, 4, 8),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
