"""Editing by a model that was never trained to edit, on digits or pairs of digits.

    python -m causalfusion_jax.train --config=configs/digits.py --workdir=runs/digits
    python launch/bench/editing.py --workdir=runs/digits [--cfg_scale=3] [--num=200] [--picture=editing.png]

Takes held-out images, which the model has not seen, and regenerates a part of them in S = 1 and
S = 4 AR steps: of digits the bottom, the top, the middle or all but the middle, under their own
class and under another; of pairs (a run of configs/digit_pairs.py, by prompts, or of its data
without text, by classes) one of the two digits, as itself and as another. Prints how many
results SVCs that have seen real held-out digits alone read as what was asked for (both digits of a
pair), and whether every kept pixel is bit-identical. The picture has a block for each mask: the
image, the mask, the new class in 1 AR step and in 4.
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.pictures import edit_strip, save_png, to_uint8
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.digit_pairs import DigitPairsSource, digit_pairs, score_pairs
from causalfusion_jax.data.digits import digits, score_digits
from causalfusion_jax.data.tokenizers import to_slots
from causalfusion_jax.sampling import editing
from causalfusion_jax.sampling.generation import SamplingJob
from causalfusion_jax.sampling.trained import from_run

_WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "A run of configs/digits.py or configs/digit_pairs.py.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 3.0, "Guidance scale; the paper edits with 1.5 and 3.")
_NUM = flags.DEFINE_integer("num", 200, "Images edited in each case.")
_PICTURE = flags.DEFINE_string("picture", "", "PNG to write [none].")
AR_STEPS = (1, 4)
SHOWN = 6


class Digits:
    """Single digits: every mask asks for another digit."""

    masks = ("bottom", "top", "center", "outer")

    def __init__(self, num: int, rng: np.random.Generator):
        real = digits("held_out")
        chosen = rng.permutation(len(real))[:num]
        self.images, self.labels = real.images[chosen], real.labels[chosen]
        self._other = (self.labels + rng.integers(1, 10, len(chosen))) % 10

    def changed(self, mask: str) -> np.ndarray:
        """The class to ask for where `mask` is regenerated as something new; int [num]."""
        return self._other

    def score(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        """Share of images [num, 8, 8, 1] in [-1, 1] that are read as `labels`."""
        return score_digits(pixels, labels)["accuracy"]


class Pairs:
    """Two digits: a mask asks for another one in its half."""

    masks = ("right", "left")

    def __init__(self, num: int, rng: np.random.Generator):
        source = digit_pairs("held_out_digits")
        examples = [source[int(i)] for i in rng.choice(len(source), num, replace=False)]
        self.images, self.labels = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
        self._shift = rng.integers(1, 10, num)

    def changed(self, mask: str) -> np.ndarray:
        """As of Digits."""
        left, right = self.labels // 10, self.labels % 10
        if mask == "right":
            return 10 * left + (right + self._shift) % 10
        return 10 * ((left + self._shift) % 10) + right

    def score(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        """As of Digits, of images [num, 8, 16, 1] and both of their digits."""
        return score_pairs(pixels, labels)["accuracy"]


def edit(config, params, mask: str, ar_steps: int, images: np.ndarray, labels: np.ndarray):
    """Results, uint8 [num, height, width, 1], and the pixels regenerated."""
    hidden = editing.tokens_of_mask(editing.named_mask(mask, *images.shape[1:3]), config.model.patch_size)
    plan = editing.plan_edit(config, hidden)
    sampler = dataclasses.replace(config.sampling, ar_steps=ar_steps, step_sizes=(), cfg_scale=_CFG_SCALE.value)
    sampler = editing.edit_sampler(sampler, plan, explicit_steps=True)
    text = None
    if config.text.is_on:
        text = np.stack([to_slots(config.text, DigitPairsSource.class_names[label]) for label in labels])
        labels = np.full_like(labels, config.data.num_classes)
    job = SamplingJob(config, sampler, Condition(labels, text))
    results = editing.edit_images(job, params, plan, images)
    return results, editing.pixels_of_tokens(plan.hidden, config.model.patch_size)


def main(argv):
    """Runs the cases."""
    del argv
    trained = from_run(_WORKDIR.value)
    config, params = trained.config, trained.params()
    kinds = {"digits": Digits, "digit_pairs": Pairs}
    require(
        config.data.source in kinds, "--workdir", _WORKDIR.value, f"must be a run of data.source {' or '.join(kinds)}"
    )
    case = kinds[config.data.source](_NUM.value, np.random.default_rng(0))
    own, before = case.labels, to_uint8(case.images)
    print(f"{len(own)} held-out images, guidance {_CFG_SCALE.value:g}\n")
    print("| regenerated | S | as it was | new class | kept pixels bit-identical |\n|---|---|---|---|---|")
    blocks = []
    for mask in case.masks:
        shown = []
        for ar_steps in AR_STEPS:
            accuracy, identical = [], True
            for labels in (own, case.changed(mask)):
                results, region = edit(config, params, mask, ar_steps, case.images, labels)
                identical &= bool((results == before)[:, ~region].all())
                accuracy.append(case.score(results / 127.5 - 1.0, labels))
            shown.append(results[:SHOWN])
            kept = "yes" if identical else "NO"
            print(f"| {mask} | {ar_steps} | {accuracy[0]:.3f} | {accuracy[1]:.3f} | {kept} |", flush=True)
        results = np.stack(shown, axis=1).reshape(-1, *before.shape[1:])
        strip = edit_strip(before[:SHOWN], region, results)
        blocks.append(np.pad(strip, ((4, 4), (4, 4), (0, 0)), constant_values=255))
    if _PICTURE.value:
        save_png(pathlib.Path(_PICTURE.value), np.concatenate(blocks, axis=1))


if __name__ == "__main__":
    app.run(main)
