#!/usr/bin/env bash
# Editing by a model that was never trained to edit, on digits:
#
#   bash launch/bench/editing.sh [WORKDIR] [CFG_SCALE]      (default: dial/causalfusion, 1)
#
# Trains configs/digits.py (or uses the run that is there), takes 200 held-out digits and
# regenerates the bottom, the top, the middle or all but the middle, in S = 1 and S = 4 AR
# steps, under their own class and under another one. Prints how many results an SVC that has
# only seen real digits reads as the class asked for, whether every kept pixel is bit-identical,
# and writes WORKDIR/editing_CFG_SCALE.png: for each mask six digits, the mask, the new class in
# one AR step and in four.
# About 10 minutes on two CPU cores; run it again to resume or to reuse what is there.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../dial/causalfusion}")"
cfg_scale="${2:-1}"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"

python -m causalfusion_jax.train --config=configs/digits.py --workdir="$workdir" --config.logging.sample_every=0
edits="$workdir/edits_$cfg_scale"
mkdir -p "$edits"
python - "$edits" <<'PY'
import pathlib
import sys

import numpy as np

from causalfusion_jax.data.sources import digits
from causalfusion_jax.sampling.images import to_uint8

real, rng = digits("held_out"), np.random.default_rng(0)
chosen = rng.permutation(len(real))[:200]
labels = {"same": real.labels[chosen]}
labels["new"] = (labels["same"] + rng.integers(1, 10, 200)) % 10
for kind, asked in labels.items():
    np.savez(pathlib.Path(sys.argv[1]) / f"{kind}.npz", to_uint8(real.images[chosen]), asked)
PY

masks=(bottom top center outer)
for mask in "${masks[@]}"; do
  for ar_steps in 1 4; do
    for kind in same new; do
      out="$edits/${mask}_${ar_steps}_$kind"
      python -m causalfusion_jax.edit --workdir="$workdir" --image="$edits/$kind.npz" --mask="$mask" \
        --ar_steps="$ar_steps" --cfg_scale="$cfg_scale" --out="$out" > /dev/null
      python -m causalfusion_jax.evaluate --workdir="$workdir" --samples="$out/samples.npz" > /dev/null
    done
  done
done

python - "$edits" "${masks[@]}" <<'PY'
import json
import pathlib
import sys

import numpy as np

from causalfusion_jax.sampling.images import edit_strip, save_png

edits, masks = pathlib.Path(sys.argv[1]), sys.argv[2:]
print("\n| regenerated | S | own class | new class | kept pixels bit-identical |\n|---|---|---|---|---|")
shown, strips = np.arange(6), []
for mask in masks:
    for ar_steps in (1, 4):
        accuracy, identical = [], []
        for kind in ("same", "new"):
            out = edits / f"{mask}_{ar_steps}_{kind}"
            accuracy.append(json.loads((out / "evaluation.json").read_text())["accuracy"])
            with np.load(out / "samples.npz") as arrays:
                kept = ~arrays["mask"]
                identical.append(bool((arrays["arr_0"] == arrays["before"])[:, kept].all()))
                if kind == "new":
                    strips.append((arrays["before"][shown], arrays["mask"], arrays["arr_0"][shown]))
        print(f"| {mask} | {ar_steps} | {accuracy[0]:.3f} | {accuracy[1]:.3f} | {'yes' if all(identical) else 'NO'} |")
blocks = [
    edit_strip(before, region, np.stack([one, four], axis=1).reshape(-1, *one.shape[1:]))
    for (before, region, one), (_, _, four) in zip(strips[::2], strips[1::2], strict=True)
]
picture = edits.with_name(edits.name.replace("edits", "editing") + ".png")
save_png(picture, np.concatenate([np.pad(b, ((4, 4), (4, 4), (0, 0)), constant_values=255) for b in blocks], axis=1))
print(f"\n{picture}: a column for each mask: digit, mask, new class in 1 AR step, in 4")
PY
