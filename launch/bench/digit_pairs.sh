#!/usr/bin/env bash
# Texts and images in one model: CausalFusion against Transfusion on pairs of digits:
#
#   bash launch/bench/digit_pairs.sh [WORKDIR]          (default: pairs)
#
# Trains configs/digit_pairs.py and its :transfusion, and scores intermediate checkpoints: images of
# 500 prompts (ten held-out pairs of words), both digits read by an SVC of held-out digits; greedy
# captions of 500 images of held-out digits, in those ten pairs and in all hundred; bits per token of
# their true captions. Prints a table.
# About an hour on two CPU cores; run it again to resume or to reuse results.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../pairs}")"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh" ""

steps="${STEPS:-500 1500 2500 3000}"
models="${MODELS:-causalfusion transfusion}"
for model in $models; do
  run="$workdir/$model"
  python -m causalfusion_jax.train --config="configs/digit_pairs.py:$model" --workdir="$run" \
    --config.checkpoint.every=500 --config.checkpoint.keep=100
  for step in $steps; do
    out="$run/scores_$step"
    for task in samples held_out held_out_digits score; do
      [ -e "$out/$task" ] && continue
      case "$task" in
        samples) args=(sample --prompts=held_out) ;;
        score) args=(caption --images=held_out_digits --score) ;;
        *) args=(caption "--images=$task") ;;
      esac
      python -m "causalfusion_jax.${args[0]}" "${args[@]:1}" --workdir="$run" --step="$step" --num=500 \
        --batch_size=500 --out="$out/$task" > /dev/null
    done
    python -m causalfusion_jax.evaluate --workdir="$run" --samples="$out/samples/samples.npz" > /dev/null
    for split in held_out held_out_digits; do
      python -m causalfusion_jax.evaluate --workdir="$run" --captions="$out/$split/captions.jsonl" > /dev/null
    done
  done
done

python - "$workdir" "$models" "$steps" <<'PY'
import json
import math
import pathlib
import sys

workdir, models, steps = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
print("\n| model | step | text to image | captions, unseen pairs: exact / CIDEr | all pairs | bits per token |")
print("|---|---|---|---|---|---|")
for model in models:
    for step in steps:
        out = workdir / model / f"scores_{step}"
        image, unseen, every = (
            json.loads((out / name / "evaluation.json").read_text()) for name in ("samples", "held_out", "held_out_digits")
        )
        scores = [json.loads(line) for line in (out / "score" / "scores.jsonl").read_text().splitlines()]
        bits = -sum(s["log_prob"] for s in scores) / sum(s["tokens"] for s in scores) / math.log(2)
        captions = " | ".join("{exact_match:.3f} / {cider:.2f}".format(**score) for score in (unseen, every))
        print(f"| {model} | {step} | {image['accuracy']:.3f} | {captions} | {bits:.4f} |")
PY
