"""How `evaluate --probe=finetune` ends when a signal stops it, without the fine-tuning.

python -m stopped_probe FOLDER
"""

import pathlib
import sys
from types import SimpleNamespace

from causalfusion_jax.cli import app
from causalfusion_jax.evaluation import probing
from causalfusion_jax.training.stopping import Stopped


def stop(tuning, params):
    """In place of `Study.finetune`."""
    raise Stopped("saved step 6 of 16")


if __name__ == "__main__":
    study = SimpleNamespace(finetuning=lambda name, folder: SimpleNamespace(folder=folder), finetune=stop)
    with app.exit_status_of_training():
        probing.fine_tuned(study, {"trained": None}, pathlib.Path(sys.argv[1]), {})
