"""Editing by a model that was never trained to edit, on digits.

    python -m causalfusion_jax.train --config=configs/digits.py --workdir=runs/digits
    python launch/bench/editing.py --workdir=runs/digits [--cfg_scale=3] [--num=200] [--picture=editing.png]

Takes held-out digits, which the model has not seen, and regenerates the bottom, the top, the
middle or all but the middle, in S = 1 and S = 4 AR steps, under their own class and under
another. Prints how many results an SVC that has seen real held-out digits alone reads as the
class asked for, and whether every kept pixel is bit-identical. The picture has a block for
each mask: the digit, the mask, the new class in 1 AR step and in 4.
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags

from causalfusion_jax import cli
from causalfusion_jax.data.sources import digits
from causalfusion_jax.errors import require
from causalfusion_jax.evaluation.scores import score_digits
from causalfusion_jax.sampling import editing
from causalfusion_jax.sampling.images import edit_strip, save_png, to_uint8
from causalfusion_jax.sampling.trained import from_run

_WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "A run of configs/digits.py.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 3.0, "Guidance scale; the paper edits with 1.5 and 3.")
_NUM = flags.DEFINE_integer("num", 200, "Digits edited in each case.")
_PICTURE = flags.DEFINE_string("picture", "", "PNG to write [none].")
MASKS = ("bottom", "top", "center", "outer")
AR_STEPS = (1, 4)
SHOWN = 6


def edit(config, params, mask: str, ar_steps: int, images: np.ndarray, labels: np.ndarray):
    """Results, uint8 [num, 8, 8, 1], and the pixels regenerated."""
    hidden = editing.tokens_of_mask(editing.named_mask(mask, 8, 8), config.model.patch_size)
    plan = editing.plan_edit(config, hidden)
    sampler = dataclasses.replace(config.sampling, ar_steps=ar_steps, cfg_scale=_CFG_SCALE.value)
    sampler = editing.edit_sampler(sampler, plan, chosen=True)
    results = editing.edit_images(config, sampler, params, plan, images, labels, seed=0)
    return results, editing.pixels_of_tokens(plan.hidden, config.model.patch_size)


def main(argv):
    """Runs the cases."""
    del argv
    trained = from_run(_WORKDIR.value)
    config, params = trained.config, trained.params()
    require(config.data.source == "digits", "--workdir", _WORKDIR.value, "must be a run of configs/digits.py")
    real, rng = digits("held_out"), np.random.default_rng(0)
    chosen = rng.permutation(len(real))[: _NUM.value]
    images, own = real.images[chosen], real.labels[chosen]
    new, before = (own + rng.integers(1, 10, len(own))) % 10, to_uint8(images)
    print(f"{len(own)} held-out digits, guidance {_CFG_SCALE.value:g}\n")
    print("| regenerated | S | own class | new class | kept pixels bit-identical |\n|---|---|---|---|---|")
    blocks = []
    for mask in MASKS:
        shown = []
        for ar_steps in AR_STEPS:
            accuracy, identical = [], True
            for labels in (own, new):
                results, region = edit(config, params, mask, ar_steps, images, labels)
                identical &= bool((results == before)[:, ~region].all())
                accuracy.append(score_digits(results / 127.5 - 1.0, labels)["accuracy"])
            shown.append(results[:SHOWN])
            kept = "yes" if identical else "NO"
            print(f"| {mask} | {ar_steps} | {accuracy[0]:.3f} | {accuracy[1]:.3f} | {kept} |", flush=True)
        results = np.stack(shown, axis=1).reshape(-1, *before.shape[1:])
        strip = edit_strip(before[:SHOWN], region, results)
        blocks.append(np.pad(strip, ((4, 4), (4, 4), (0, 0)), constant_values=255))
    if _PICTURE.value:
        save_png(pathlib.Path(_PICTURE.value), np.concatenate(blocks, axis=1))


if __name__ == "__main__":
    cli.run(main)
