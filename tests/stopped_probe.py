"""The end of `evaluate --probe=finetune` when a signal has stopped it, without the fine-tuning.

python -m stopped_probe FOLDER
"""

import pathlib
import sys
from types import SimpleNamespace

from causalfusion_jax.cli import probe_flags
from causalfusion_jax.training.stopping import Stopped


def stop(tuning, params):
    """In place of `Study.finetune`."""
    raise Stopped("saved step 6 of 16")


if __name__ == "__main__":
    study = SimpleNamespace(finetuning=lambda name, folder: SimpleNamespace(folder=folder), finetune=stop)
    probe_flags._finetuned(study, {"trained": None}, pathlib.Path(sys.argv[1]), {})
