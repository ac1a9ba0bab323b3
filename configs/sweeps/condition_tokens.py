"""CausalFusion's ablation of the number of condition tokens of a class.

The paper's FID-10k at one AR step: 4 tokens 12.13, 16 tokens 12.04, 64 tokens 11.84; 64 tokens of
which 1 is learned and repeated 12.29, of which 4 are learned and repeated 11.75.

    python launch/sweep.py --sweep=configs/sweeps/condition_tokens.py:digits --workdir=sweeps/condition_tokens
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    return Sweep(
        config=CONFIGS[data],
        overrides=chain(
            grid({"model.num_condition_tokens": [4, 16, 64]}),
            grid({"model.num_condition_tokens": [64], "model.condition_repeats": [64, 16]}),
        ),
        fixed={"logging.sample_every": 0},
        ar_steps=(1,),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
