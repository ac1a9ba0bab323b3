#!/usr/bin/env bash
# From diffusion to autoregression: CausalFusion and ACDiT on digits by number of AR steps:
#
#   bash launch/bench/digits_dial.sh [WORKDIR]          (default: dial)
#
# Trains configs/digits.py and configs/digits.py:acdit, samples each at 1, 2, 4, 8 and 16 AR
# steps (1000 images, 50 DDPM steps; guidance of the configs: none for CausalFusion, 1.5 for ACDiT)
# and prints accuracy and fd as a table.
# About 20 minutes on two CPU cores; run it again to resume or to reuse results.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../dial}")"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh" ""

steps=(1 2 4 8 16)
for model in causalfusion acdit; do
  run="$workdir/$model"
  python -m causalfusion_jax.train --config="configs/digits.py:$model" --workdir="$run" \
    --config.logging.sample_every=0
  for ar_steps in "${steps[@]}"; do
    out="$run/samples_ar$ar_steps"
    python -m causalfusion_jax.sample --workdir="$run" --num=1000 --ar_steps="$ar_steps" --out="$out" > /dev/null
    python -m causalfusion_jax.evaluate --workdir="$run" --samples="$out/samples.npz" > /dev/null
  done
done

python - "$workdir" "${steps[@]}" <<'PY'
import json
import pathlib
import sys

workdir, steps = pathlib.Path(sys.argv[1]), sys.argv[2:]
print(f"\n| accuracy / fd at S = | {' | '.join(steps)} |\n|---|{'---|' * len(steps)}")
for model in ("causalfusion", "acdit"):
    scores = [json.loads((workdir / model / f"samples_ar{s}" / "evaluation.json").read_text()) for s in steps]
    cells = " | ".join("{accuracy:.3f} / {fd:.2f}".format(**score) for score in scores)
    print(f"| {model} | {cells} |")
PY
