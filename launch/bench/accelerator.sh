#!/usr/bin/env bash
# The first session on an accelerator: checks that it trains, stops and resumes correctly, and measures its speed.
#
#   bash launch/bench/accelerator.sh [--out=FOLDER] [--part=NAME] [--rehearse]
#
#   digits      trains configs/digits.py with checkpoints, grids and evaluations; again, with a SIGKILL
#               half way and a resume; compares weights and samples at the end
#   attention   attention in tiles (the Pallas kernel on a TPU, plain JAX elsewhere) against dense:
#               values in float32 and bfloat16, and speed, by length
#   step        CausalFusion-XL's training step at the batch sizes that fit: images/s, MFU, and on a
#               TPU preflight's bound
#   sampler     CausalFusion-XL's sampler with its cache, at 1 and 8 AR steps: images/s
#
# FOLDER (default: accelerator) receives results.md with a table of every part, results.jsonl with a
# line of every part, and logs/. No command takes more than ten minutes, and measurements are kept: run
# it again after any interruption, or part by part. --rehearse runs a small version of it on a CPU.
#
# Needs the project's packages: `. launch/setup_env.sh cuda` (or tpu) makes .venv with them. PYTHON
# chooses the interpreter (default: that of .venv where there is one, else python3).
#
# Exit status: 0 success; 1 a part failed, or a value is out of its tolerance; 2 wrong input.

set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ " $* " == *" --help "* ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
python="$folder/../../.venv/bin/python"
[[ -x "$python" ]] || python=python3
exec "${PYTHON:-$python}" "$folder/accelerator.py" "$@"
