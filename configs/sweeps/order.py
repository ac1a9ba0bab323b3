"""CausalFusion's ablation of the token order, sampled in the order trained, in one AR step.

The paper chose random (FID-10k 12.89; raster 14.46, block-raster 8x8 14.76 and 4x4 14.62,
dilated 15.54). It does not give the stride of dilated, which is 2 here. The 4x4 tokens of digits
have blocks of one size, 2x2: larger or smaller blocks are raster.

    python launch/sweep.py --sweep=configs/sweeps/order.py:digits --workdir=sweeps/order
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid, together

CONFIGS = {"digits": "configs/digits.py", "imagenet": "configs/imagenet_causalfusion.py:L,ablation"}
BLOCKS = {"digits": [2], "imagenet": [8, 4]}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    blocks = BLOCKS[data]
    return Sweep(
        config=CONFIGS[data],
        overrides=chain(
            grid({"factorization.order": ["raster"]}),
            together({"factorization.order": ["block_raster"] * len(blocks), "factorization.order_block": blocks}),
            together({"factorization.order": ["dilated"], "factorization.order_block": [2]}),
            grid({"factorization.order": ["random"]}),
        ),
        fixed={"factorization.weight": "none", "logging.sample_every": 0},
        ar_steps=(1,),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
