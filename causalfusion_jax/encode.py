"""Encodes a data set once, for training on latents.

    python -m causalfusion_jax.encode --config=configs/imagenet_causalfusion.py:XL --config.data.source=tfds \
        --vae=converted/kl16 --out=latents/imagenet_kl16
    python -m causalfusion_jax.train --config=configs/imagenet_causalfusion.py:XL --config.data.source=latents \
        --config.data.path=latents/imagenet_kl16 --workdir=runs/imagenet_xl

The config is that of the model to train on the latents, its source changed to the images
(tfds, image_folder, tar; clip_folder); or one of the images themselves. Images are cropped as ADM
does; kept are mean and standard deviation of each, in bfloat16, upright and mirrored, with the
label and, with --captions, all captions, in sharded ArrayRecord files beside manifest.json:
checksums, statistics, counts. Of a video, its middle data.frames frames, each encoded by itself;
--micro_batch counts frames then.

Stop it any way you like, and run the same command again: it goes on with the first shard that
is not whole, and ends in the very bytes of a run that was not stopped. Other images (by the names
and sizes of their files) are refused, and so is a folder that is being written. On a pod run it on
every host with --multihost: shards are dealt out to hosts, batches to a host's devices.
"""

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import command as cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: configs/NAME.py or configs/NAME.py:ARG.")
_VAE = flags.DEFINE_string("vae", None, "Folder of the converted autoencoder.")
_OUT = flags.DEFINE_string("out", None, "Folder to write: new, empty, or that of this request to go on with.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images encoded at a time, over the devices of a host.")
_MICRO_BATCH = flags.DEFINE_integer("micro_batch", 16, "Images in a device's memory at a time.")
_PER_SHARD = flags.DEFINE_integer("records_per_shard", 8192, "Images in a file.")
_CAPTIONS = flags.DEFINE_bool("captions", False, "Keep captions too.")
_join_processes = cli.define_processes()
flags.adopt_module_key_flags(cli)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.common import distributed
    from causalfusion_jax.common.errors import require
    from causalfusion_jax.config import experiment
    from causalfusion_jax.prepare import encoding
    from causalfusion_jax.sampling.trained import open_autoencoder

    config = experiment.from_dict(_CONFIG.value.to_dict())
    flag_of = {"batch_size": _BATCH, "micro_batch": _MICRO_BATCH, "records_per_shard": _PER_SHARD}
    for name, flag in flag_of.items():
        require(flag.value >= 1, f"--{name}", flag.value, "must be >= 1")
    settings = encoding.EncodeConfig(**{name: flag.value for name, flag in flag_of.items()}, captions=_CAPTIONS.value)
    converted, vae = open_autoencoder(_VAE.value)
    _join_processes()
    manifest = encoding.encode(config.data, converted, vae, _OUT.value, settings)
    corrupt = f", {len(manifest['corrupt'])} corrupt left out" if manifest["corrupt"] else ""
    if distributed.is_primary():
        print(f"{manifest['num_records']} latents of shape {manifest['shape']} in {_OUT.value}{corrupt}")


if __name__ == "__main__":
    cli.run(main, required=("config", "vae", "out"))
