#!/usr/bin/env bash
# How well features of generative training classify digits, CausalFusion against plain DiT:
#
#   bash launch/bench/understanding.sh [WORKDIR]          (default: understanding)
#
# Trains configs/digits.py and configs/digits.py:dit for the same number of steps, and probes both,
# trained and untrained, on the held-out half: linear probe, 20 nearest neighbours, fine-tuning; and
# a map of layers and noise levels (WORKDIR/MODEL/probe_map.png). Prints a table. About 25 minutes on
# two CPU cores, 12 of them training; run it again to resume or to reuse results. STEPS and EPOCHS are
# those of training and of fine-tuning.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../understanding}")"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh" ""

models="causalfusion dit"
for model in $models; do
  run="$workdir/$model" config="configs/digits.py:$model"
  python -m causalfusion_jax.train --config="$config" --workdir="$run" --config.logging.sample_every=0 \
    ${STEPS:+--config.train.steps="$STEPS"}
  for probe in linear knn map finetune; do
    python -m causalfusion_jax.probe --kind="$probe" --untrained --workdir="$run" --config="$config" \
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
    results = {name: json.loads((workdir / model / f"probe_{name}.json").read_text()) for name in (*probes, "map")}
    linear = results["linear"]
    tokens = "clean tokens" if linear["tokens"] == "clean" else f"noisy tokens, t = {linear['noise_level']:g} T"
    best = results["map"]["best"]
    position = f"layer {best['layer']}, {best['tokens']}"
    for trained in (True, False):
        rows = [results[name] if trained else results[name]["untrained"] for name in probes]
        cells = " | ".join(f"{result['top1']:.3f}" for result in rows)
        table = results["map"]["trained" if trained else "untrained"]
        top = f"{best['top1']:.3f} ({position})" if trained else f"{max(map(max, table)):.3f}"
        print(f"| {model}{'' if trained else ', untrained'} | {tokens}, layer {linear['layer']} | {cells} | {top} |")
PY
