"""Compares our scores with the papers', and tells for each of their claims whether it holds here.

    python launch/tables/render.py --workdir=tables [--on=digits] [--table=gamma,order] --out=launch/tables/RESULTS.md

Reads the scores that run.py left in WORKDIR; cells that were not run yet stay empty. Give the --override
that launch/sweep.py was given; runs with other settings are refused. Whether a claim holds is computed by the
rule that is printed above the tables. Without --out the page is printed.
"""

import pathlib

import page
import tables
from absl import flags

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import require
from causalfusion_jax.sweeps import sweep as sweeps

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that run.py was given.")
_ON = flags.DEFINE_enum("on", "digits", tables.DATA, "What was trained on.")
_TABLE = flags.DEFINE_list("table", [], f"Some of {', '.join(tables.TABLES)} [all].")
_SEEDS = flags.DEFINE_integer("seeds", tables.SEEDS, "Runs of every setting.")
_NUM = flags.DEFINE_integer("num", 0, "Images in a score, as given to run.py.")
_OVERRIDE = flags.DEFINE_multi_string("override", [], "Settings of all runs, as given to launch/sweep.py.")
_OUT = flags.DEFINE_string("out", "", "Markdown file to write.")
_HEADER = flags.DEFINE_string("header", "", "Line to print below the title: date and machine.")


def main(argv):
    """Runs the command."""
    del argv
    workdir = pathlib.Path(_WORKDIR.value)
    require(workdir.is_dir(), "--workdir", str(workdir), "no such folder")
    require(_SEEDS.value >= 1, "--seeds", _SEEDS.value, "must be >= 1")
    runs = _ON.value, _SEEDS.value, _NUM.value
    overrides = sweeps.parse_overrides("--override", ",".join(_OVERRIDE.value))
    scores = page.collect(workdir, tables.check_names(_TABLE.value), *runs, overrides)
    text = page.render(scores, *runs, _HEADER.value, _OVERRIDE.value)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    app.run(main, required=("workdir",))
