"""Trains a causal diffusion transformer, or continues a run.

    python -m causalfusion_jax.train --config=configs/digits.py --workdir=runs/digits

Any setting of the config can be changed on the command line:

    --config.train.steps=500 --config.model.hidden=128 --config.optimizer.learning_rate=3e-4

WORKDIR receives config.json, classes.json (names of the classes), checkpoints/ (with manifests/
of checksums), metrics.jsonl, tensorboard/ and samples/. Run the same command again to continue
from the newest intact checkpoint; the result is that of an uninterrupted run. Settings that
do not change what is learned may differ then, and the learning rate; config_history.jsonl records
the changes.

SIGTERM or Ctrl-C saves at the next step and stops; a second one ends the process at once. Exit
status: 0 when the last step, its evaluation and its samples are done; 75, on all processes, when a
signal stopped training earlier and its state is saved: run the same command again; 1 when training
diverged or failed; 2 when the input is wrong. A second training process in WORKDIR is refused.

On a pod run it on every host with --multihost; elsewhere give --coordinator_address, --num_processes
and --process_id (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). Settings are
described in causalfusion_jax/config/.
"""

import sys

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import app

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: configs/NAME.py or configs/NAME.py:ARG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: new, empty, or that of a run to continue.")
_join_processes = app.define_processes()
flags.adopt_module_key_flags(app)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.config import experiment

    config = experiment.from_dict(_CONFIG.value.to_dict())
    _join_processes()
    # TensorBoard's writer takes seconds to import: only once the settings are known to be right.
    from causalfusion_jax.evaluation.periodic import Evaluator
    from causalfusion_jax.sampling.preview import Preview
    from causalfusion_jax.training import loop

    with app.exit_status_of_training(sys.stdout):
        loop.train(config, _WORKDIR.value, make_evaluator=Evaluator, make_preview=Preview)


if __name__ == "__main__":
    app.run(main, required=("config", "workdir"))
