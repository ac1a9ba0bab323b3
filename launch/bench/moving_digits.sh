#!/usr/bin/env bash
# Video: ACDiT on clips of moving digits, sampled four times as long with a rolling window:
#
#   bash launch/bench/moving_digits.sh [WORKDIR]          (default: moving_digits)
#
# Trains configs/moving_digits.py on 16 frames, samples NUM (200) clips of 64, and scores them: the
# class in every frame by an SVC of held-out digits, and the distance of the tracked path from a
# straight line with bounce; both also for real clips of the training digits, and for the samples with
# their frames in random order, the score of no motion. Then the peak memory of sampling 16, 64 and 256
# frames. Prints a table. About 45 minutes on two CPU cores, 30 of them training; run it again to
# resume or to reuse results.

workdir="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../moving_digits}")"
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh" ""

python -m causalfusion_jax.train --config=configs/moving_digits.py --workdir="$workdir/run" \
  --config.logging.sample_every=0
python -m causalfusion_jax.sample --workdir="$workdir/run" --frames=64 --num="${NUM:-200}" --out="$workdir/samples_64"

python - "$workdir" <<'PY'
import json
import pathlib
import subprocess
import sys

import numpy as np

from causalfusion_jax.config.workdir import load_config
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.moving_digits import score_moving_digits
from causalfusion_jax.common.pictures import to_uint8

workdir = pathlib.Path(sys.argv[1])
data = load_config(str(workdir / "run")).data
with np.load(workdir / "samples_64" / "samples.npz") as arrays:
    clips, labels = arrays["arr_0"], arrays["arr_1"]
random = np.random.default_rng(0)
source = make_source(data)
real = [source[int(index)] for index in random.choice(len(source), len(clips), replace=False)]
rows = {
    "real clips": (to_uint8(np.stack([clip["image"] for clip in real])), np.array([clip["label"] for clip in real])),
    "samples": (clips, labels),
    "samples, frames in random order": (clips[:, random.permutation(clips.shape[1])], labels),
}
names = ("accuracy", "motion_error", "accuracy_beyond", "motion_error_beyond")
print(f"\n| {len(clips)} clips | class, frames 1-16 | motion error, pixels | class, frames 17-64 | motion error |")
print("|---|---|---|---|---|")
scores = {}
for row, (videos, classes) in rows.items():
    scores[row] = score_moving_digits(videos, classes, data.frames)
    print(f"| {row} | {' | '.join(format(scores[row][n], '.3f') if n in scores[row] else '' for n in names)} |")

MEASURED = """
import resource, runpy, sys
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
print("\n| frames | 16 | 64 | 256 |\n|---|---|---|---|")
peaks = []
for frames in (16, 64, 256):
    args = [f"--workdir={workdir / 'run'}", f"--frames={frames}", "--num=8", "--solver_steps=4"]
    args += [f"--out={workdir / f'memory_{frames}'}", "--seed=1"]
    code = f"import sys; sys.argv = ['causalfusion_jax.sample', *{args!r}]\n{MEASURED}"
    subprocess.run(["rm", "-rf", workdir / f"memory_{frames}"], check=True)
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    peaks.append(int(printed.split()[-1]) / 1024)
print(f"| peak of 8 clips, MiB | {' | '.join(f'{peak:.0f}' for peak in peaks)} |")
print(json.dumps({"scores": scores, "peak_mib": peaks}))
PY
