#!/usr/bin/env bash
# From a fresh machine to generated digits and their scores:
#
#   bash launch/demo.sh [WORKDIR]          (default: demo)
#
# Sets up .venv, trains configs/digits.py (a few minutes on two CPU cores), samples 1000
# digits at 1, 4 and 16 AR steps, and scores them. Run it again to resume or to reuse results.

# Resolved before setup_env.sh changes to the repository's folder.
workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../demo}")"
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

python -m causalfusion_jax.train --config=configs/digits.py --workdir="$workdir"
for ar_steps in 1 4 16; do
  out="$workdir/samples_ar$ar_steps"
  echo "sampling with $ar_steps AR steps"
  python -m causalfusion_jax.sample --workdir="$workdir" --num=1000 --ar_steps="$ar_steps" --out="$out"
  python -m causalfusion_jax.evaluate --workdir="$workdir" --samples="$out/samples.npz" > /dev/null
done

echo
echo "grids and scores (AR steps: 1 is diffusion, 16 is token by token):"
for ar_steps in 1 4 16; do
  out="$workdir/samples_ar$ar_steps"
  echo "  $out/grid.png  $(cat "$out/evaluation.json")"
done
