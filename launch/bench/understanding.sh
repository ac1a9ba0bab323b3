#!/usr/bin/env bash
# What generative training understands of digits, CausalFusion beside plain DiT:
#
#   bash launch/bench/understanding.sh [WORKDIR]          (default: understanding)
#
# Trains configs/digits.py and configs/digits.py:dit for the same number of steps, and probes
# both and their untrained selves on the held-out half: linear probe, 20 nearest neighbours,
# fine-tuning; and a map of layers and noise levels (WORKDIR/MODEL/probe_map.png). Prints a table.
# About 25 minutes on two CPU cores, 12 of them training; run it again to resume or to reuse what
# is there. STEPS and EPOCHS are those of training and of fine-tuning.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../understanding}")"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh" ""

models="causalfusion dit"
for model in $models; do
  run="$workdir/$model" config="configs/digits.py:$model"
  python -m causalfusion_jax.train --config="$config" --workdir="$run" --config.logging.sample_every=0 \
    ${STEPS:+--config.train.steps="$STEPS"}
  for probe in linear knn map finetune; do
    python -m causalfusion_jax.evaluate --probe="$probe" --untrained --workdir="$run" --config="$config" \
      ${EPOCHS:+--config.finetune.epochs="$EPOCHS"} > /dev/null
  done
done

python - "$workdir" "$models" <<'PY'
import json
import pathlib
import sys

workdir, models = pathlib.Path(sys.argv[1]), sys.argv[2].split()
probes = ("linear", "knn", "finetune")
print("\n| top-1 of held-out digits | read by | linear probe | 20 nearest neighbours | fine-tuned | best of the map |")
print("|---|---|---|---|---|---|")
for model in models:
    found = {name: json.loads((workdir / model / f"probe_{name}.json").read_text()) for name in (*probes, "map")}
    linear = found["linear"]
    way = "clean tokens" if linear["tokens"] == "clean" else f"noisy tokens, t = {linear['noise_level']:g} T"
    best = found["map"]["best"]
    where = f"layer {best['layer']}, {best['tokens']}"
    for trained in (True, False):
        of = [found[name] if trained else found[name]["untrained"] for name in probes]
        cells = " | ".join(f"{result['top1']:.3f}" for result in of)
        table = found["map"]["trained" if trained else "untrained"]
        top = f"{best['top1']:.3f} ({where})" if trained else f"{max(map(max, table)):.3f}"
        print(f"| {model}{'' if trained else ', untrained'} | {way}, layer {linear['layer']} | {cells} | {top} |")
PY
