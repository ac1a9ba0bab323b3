"""CausalFusion's comparison of one timestep t for all AR steps of an image with one for each, or a few draws.

The paper finds no difference (FID-10k: shared 12.13, independent 12.27; with 4 draws per image
12.19, with 8 12.23).

    python launch/sweep.py --sweep=configs/sweeps/t_sharing.py:digits --workdir=sweeps/t_sharing
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
            grid({"diffusion.t_shared_by": ["image", "step"]}),
            grid({"diffusion.t_shared_by": ["step"], "diffusion.t_draws": [4, 8]}),
        ),
        fixed={"logging.sample_every": 0},
        ar_steps=(1,),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
