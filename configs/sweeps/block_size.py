"""ACDiT's block size, from autoregression to full-sequence diffusion.

Every model is sampled with the blocks it was trained on. ACDiT's paper gives no FID by block size,
but upper bounds of the perplexity on text: blocks of 256 tokens 22.98, 128 22.82, 8 21.59.

    python launch/sweep.py --sweep=configs/sweeps/block_size.py:digits --workdir=sweeps/block_size
"""

from causalfusion_jax.config.experiment import choose
from causalfusion_jax.sweeps.sweep import Sweep, together

CONFIGS = {"digits": "configs/digits.py:acdit", "imagenet": "configs/imagenet_acdit.py:L"}
TOKENS = {"digits": 16, "imagenet": 1024}
BLOCKS = {"digits": [1, 4, 16], "imagenet": [64, 256, 1024]}


def get_sweep(arg: str = "digits"):
    """The sweep; `arg` is the training data, digits or imagenet."""
    (data,) = choose(arg, data=tuple(CONFIGS))
    blocks = BLOCKS[data]
    return Sweep(
        config=CONFIGS[data],
        overrides=together({"factorization.block_size": blocks, "factorization.order_block": blocks}),
        fixed={"logging.sample_every": 0},
        ar_steps=tuple((TOKENS[data] // block,) for block in blocks),
        num_samples={"digits": 1000, "imagenet": 10_000}[data],
    )
