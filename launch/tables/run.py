"""Trains, samples and scores the runs that tables need and do not have yet, with launch/sweep.py.

    python launch/tables/run.py --workdir=tables -- --parallel=2
    python launch/tables/run.py --table=gamma,order,fixed_steps --workdir=tables
    python launch/tables/run.py --table=gamma --on=imagenet --workdir=/shared/tables --dry_run -- \
        --override=data.path=/shared/latents --sample_flags=--vae=/shared/sd_vae \
        --evaluate_flags='--inception=/shared/inception --reference=/shared/reference.npz' \
        --launcher='sbatch --job-name={name} --gpus=8 --wrap="{command}"'

The flags after `--` are those of launch/sweep.py. A run that several tables have in common is
trained once, and scored once at each number of AR steps. The same command again, also with more
tables or more --seeds, runs only what is missing. Then

    python launch/tables/render.py --workdir=tables
"""

import pathlib
import signal
import subprocess
import sys

import tables
from absl import flags

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import require

_TABLE = flags.DEFINE_list("table", [], f"Some of {', '.join(tables.TABLES)} [all].")
_ON = flags.DEFINE_enum("on", "digits", tables.DATA, "What is trained on.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs, those of earlier calls too.")
_SEEDS = flags.DEFINE_integer("seeds", tables.SEEDS, "Runs of every setting.")
_NUM = flags.DEFINE_integer("num", 0, "Images in a score [1000, of ImageNet 10000].")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands; change nothing.")


def run(command: list[str]) -> int:
    """Runs a command, passes SIGTERM on to it, and returns its exit status."""
    process = subprocess.Popen(command, cwd=pathlib.Path.cwd())
    # The terminal sends Ctrl-C to the command as well.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv, passed: list[str]):
    """Runs the command; `passed` goes to launch/sweep.py."""
    del argv
    require(_SEEDS.value >= 1, "--seeds", _SEEDS.value, "must be >= 1")
    require(_NUM.value == 0 or _NUM.value >= 2, "--num", _NUM.value, "must be >= 2")
    groups = tables.groups(tables.check_names(_TABLE.value), _ON.value)
    statuses = []
    for folder, names in groups.items():
        arg = f"{_ON.value},{','.join(names)},seeds={_SEEDS.value},num={_NUM.value}"
        if not _DRY_RUN.value:
            print(tables.describe(names, _ON.value, _SEEDS.value, _NUM.value), flush=True)
        statuses.append(
            run(
                [
                    sys.executable,
                    str(tables.ROOT / "launch" / "sweep.py"),
                    f"--sweep={tables.__file__}:{arg}",
                    f"--workdir={pathlib.Path(_WORKDIR.value) / folder}",
                    *passed,
                    *(["--dry_run"] if _DRY_RUN.value else []),
                ]
            )
        )
        if statuses[-1] == app.INTERRUPTED or statuses[-1] < 0:
            break
    sys.exit(next((status for status in statuses if status), 0))


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, to_sweep = sys.argv[:split], sys.argv[split + 1 :]
    app.run(lambda argv: main(argv, to_sweep), required=("workdir",))
