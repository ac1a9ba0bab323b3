"""Parses a command of the package with its own flags, and builds its config; runs nothing.

python -m parse_command causalfusion_jax.train --config=... --workdir=...
"""

import runpy
import sys

from absl import flags

from causalfusion_jax.cli import app
from causalfusion_jax.config import experiment


def parse_only(main, required=()):
    """In place of `app.run`."""
    if len(rest := app.parse(sys.argv, required)) > 1:
        sys.exit(f"arguments that are not flags: {rest[1:]}")
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
        experiment.from_dict(flags.FLAGS["config"].value.to_dict())


if __name__ == "__main__":
    # Overrides of a config are read from there.
    sys.argv = sys.argv[1:]
    app.run = parse_only
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
