"""Measures what a network has learned about images: classifiers of its features, and fine-tuning.

    python -m causalfusion_jax.probe --kind=linear --workdir=runs/digits --untrained
    python -m causalfusion_jax.probe --kind=finetune --workdir=runs/digits --config=configs/digits.py \
        --config.finetune.epochs=30 --out=runs/digits/finetuned_30.json

Kinds: `linear` and `knn` classify features of one layer, `finetune` fine-tunes all weights, `map`
repeats `linear` for every layer and noise level and draws a PNG. All are trained on the training data
and tested on held-out data. Settings are `config.probe` and `config.finetune`
(causalfusion_jax/config/probe.py) of the run, or of --config.

Prints one JSON line with `top1` (and `top5`) and writes it to WORKDIR/probe_KIND.json, or --out; an
existing result of another request is never replaced. Fine-tuning keeps checkpoints in the folder of that
name without .json and continues from them; it takes the same flags for several processes as training.
"""

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import app, probe_flags

_KIND = flags.DEFINE_string("kind", None, "linear, knn, finetune or map.")
_OUT = flags.DEFINE_string("out", None, "The new .json file [WORKDIR/probe_KIND.json].")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Data and settings of the probe [the run's own config].")
flags.adopt_module_key_flags(probe_flags)
flags.adopt_module_key_flags(app)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.evaluation.probing import Probe, run_probe

    probe_flags.run(Probe, run_probe, _KIND.value, _CONFIG.value, _OUT.value)


if __name__ == "__main__":
    app.run(main, required=("kind",))
