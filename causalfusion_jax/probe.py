"""Probes what a network understands of images: classifiers of its features, and fine-tuning.

    python -m causalfusion_jax.probe --kind=linear --workdir=runs/digits --untrained
    python -m causalfusion_jax.probe --kind=finetune --workdir=runs/digits --config=configs/digits.py \
        --config.finetune.epochs=30 --out=runs/digits/finetuned_30.json

Kinds: `linear` and `knn` classify features of one layer, `finetune` trains all weights further, `map`
does `linear` for every layer and noise level and draws a PNG. All learn from the training data and are
tested on held-out data. Settings are `config.probe` and `config.finetune`
(causalfusion_jax/config/probe.py), those of the run, or of --config.

Prints one JSON line with `top1` (and `top5`) and writes it to WORKDIR/probe_KIND.json, or --out; an
existing result of another request is never replaced. Fine-tuning keeps checkpoints in the folder of that
name without .json, continues from them, and takes the flags of several processes that training takes.
"""

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import command as cli, probe_flags

_KIND = flags.DEFINE_string("kind", None, "linear, knn, finetune or map.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run to probe.")
_OUT = flags.DEFINE_string("out", None, "The new .json file [WORKDIR/probe_KIND.json].")
_CONFIG = config_flags.DEFINE_config_file("config", None, "On which data to probe, and how [as the run's own config].")
flags.adopt_module_key_flags(probe_flags)
flags.adopt_module_key_flags(cli)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.config import experiment
    from causalfusion_jax.evaluation.probing import Probe, run_probe

    config = None if _CONFIG.value is None else experiment.from_dict(_CONFIG.value.to_dict())
    with cli.as_flags(), cli.exit_status_of_training():
        probe = Probe(_KIND.value, _WORKDIR.value, config=config, out=_OUT.value, **probe_flags.values())
        probe_flags.join_processes()
        run_probe(probe)


if __name__ == "__main__":
    cli.run(main, required=("kind",))
