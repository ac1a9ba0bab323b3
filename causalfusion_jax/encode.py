"""Encodes a data set once, for training on latents.

    python -m causalfusion_jax.encode --config=configs/imagenet_causalfusion.py:XL --config.data.source=tfds \
        --vae=converted/kl16 --out=latents/imagenet_kl16
    python -m causalfusion_jax.train --config=configs/imagenet_causalfusion.py:XL --config.data.source=latents \
        --config.data.path=latents/imagenet_kl16 --workdir=runs/imagenet_xl

The config is that of the model to train on the latents, with its source changed to the images
(tfds, image_folder, tar; clip_folder), or one of the images themselves. Images are cropped as in ADM.
Mean and standard deviation of each image, upright and mirrored, are stored in bfloat16 with the label
and, with --captions, all captions, in sharded ArrayRecord files; manifest.json has checksums,
statistics and counts. Of a video, the middle data.frames frames are encoded, each by itself;
--micro_batch then counts frames.

An interrupted command continues when it is run again, from the first incomplete shard, to the same
bytes as an uninterrupted one. Other images (by the names and sizes of their files) are refused, and
so is a folder that another process writes. On a pod run it on every host with --multihost: shards
are distributed over the hosts, batches over the devices of a host.
"""

from absl import flags
from ml_collections.config_flags import DEFINE_config_file

from causalfusion_jax.cli import app, config_flags
from causalfusion_jax.prepare.settings import EncodeConfig

_CONFIG = DEFINE_config_file("config", None, "Config file: configs/NAME.py or configs/NAME.py:ARG.")
_VAE = flags.DEFINE_string("vae", None, "Folder of the converted autoencoder.")
_OUT = flags.DEFINE_string("out", None, "Folder to write: new, empty, or that of the same request, to continue it.")
_SETTINGS = config_flags.define(EncodeConfig)
_join_processes = app.define_processes()
flags.adopt_module_key_flags(app)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.common import distributed
    from causalfusion_jax.config import experiment
    from causalfusion_jax.prepare import encoding
    from causalfusion_jax.sampling.trained import open_autoencoder

    config = experiment.from_dict(_CONFIG.value.to_dict())
    settings = _SETTINGS.make()
    converted, vae = open_autoencoder(_VAE.value)
    _join_processes()
    manifest = encoding.encode(config.data, converted, vae, _OUT.value, settings)
    corrupt = f", {len(manifest['corrupt'])} corrupt records left out" if manifest["corrupt"] else ""
    if distributed.is_primary():
        print(f"{manifest['num_records']} latents of shape {manifest['shape']} in {_OUT.value}{corrupt}")


if __name__ == "__main__":
    app.run(main, required=("config", "vae", "out"))
