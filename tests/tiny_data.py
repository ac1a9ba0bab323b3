"""Small real data in the forms that sources read, and a small random autoencoder."""

import io
import json
import tarfile

import jax
import numpy as np
from helpers import GOLDENS, inception_weights
from PIL import Image

from causalfusion_jax.data.sources import digits
from causalfusion_jax.models.autoencoder import AutoencoderConfig, init_autoencoder
from causalfusion_jax.models.inception import abstract_inception
from causalfusion_jax.models.store import write_converted
from causalfusion_jax.prepare.names import from_released
from causalfusion_jax.prepare.released_inception import inception_table

TINY_VAE = AutoencoderConfig(
    channels=8,
    channel_multipliers=(1, 1, 2),
    latent_channels=4,
    scaling_factor=0.5,
    residual_blocks=1,
    norm_groups=4,
    mid_attention=False,
)
"""16x16x3 to 4x4x4."""

NAMES = digits("train").class_names


def digit_file(index: int, kind: str = "JPEG") -> bytes:
    """A digit as an encoded RGB image of 20x24 pixels."""
    pixels = np.uint8((digits("train").images[index, ..., 0] + 1) * 127.5)
    return encoded(Image.fromarray(pixels).resize((24, 20)).convert("RGB"), kind)


def encoded(image: Image.Image, kind: str) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tfds(folder: str, num: int) -> str:
    """A TFDS data set `tiny_digits` of `num` digits with captions and short videos; its data_dir."""
    import tensorflow_datasets as tfds

    class TinyDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_digits"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features
            captions = features.Sequence({"id": np.int64, "text": features.Text()})
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {
                        "image": features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "label": features.ClassLabel(names=NAMES),
                        "clip": features.Sequence(features.Image(shape=(20, 24, 3), encoding_format="jpeg")),
                        "captions": captions,
                        # As of ucf101.
                        "video": features.Video(shape=(None, 20, 24, 3), encoding_format="jpeg"),
                    }
                ),
            )

        def _split_generators(self, manager):
            del manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            labels = digits("train").labels
            # What TFDS has ffmpeg make of a file.
            video = [encoded(Image.fromarray(clip_frame(j)), "JPEG") for j in range(12)]
            for i in range(num):
                words = NAMES[labels[i]]
                yield (
                    i,
                    {
                        "image": io.BytesIO(digit_file(i)),
                        "label": int(labels[i]),
                        "clip": [io.BytesIO(digit_file(j)) for j in range(i, i + 1 + i % 4)],
                        "video": video,
                        "captions": [
                            {"id": 2 * i, "text": f"the digit {words}"},
                            {"id": 2 * i + 1, "text": f"a {words}"},
                        ],
                    },
                )

    TinyDigits(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def clip_frame(index: int) -> np.ndarray:
    """A frame of 20x24 pixels whose mean, 10 (index + 1), tells its number; lighter to the right."""
    slope = np.linspace(-8, 8, 24)[None, :, None]
    return np.uint8(np.broadcast_to(10 * (index + 1) + slope, (20, 24, 3)))


def write_clip(path, kind: str, frames: int):
    """A clip of `clip_frame`s: PATH.KIND, or for kind `folder` PATH/frame*.png; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(clip_frame(i)) for i in range(frames)]
    if kind == "folder":
        path.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(path / f"frame{i}.png")
        return path
    path = path.with_suffix(f".{kind}")
    if kind == "gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, loop=0)
        return path
    import av

    codec, options = {"webm": ("libvpx-vp9", {}), "avi": ("mpeg4", {"bf": "0"})}.get(kind, ("libx264", {"bf": "2"}))
    with av.open(str(path), "w") as container:
        # A group of pictures is shorter than the clip, so that there is something to seek.
        stream = container.add_stream(codec, rate=25, options={"g": "7", **options})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 24, 20, "yuv420p", 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def write_tars(folder, num: int, per_shard: int = 5, broken: tuple[int, ...] = ()) -> str:
    """Digits as tar shards, in WebDataset's layout; the images `broken` are cut short."""
    labels = digits("train").labels
    for start in range(0, num, per_shard):
        with tarfile.open(folder / f"digits-{start // per_shard:03d}.tar", "w") as shard:
            for i in range(start, min(start + per_shard, num)):
                image = digit_file(i, "PNG")
                label = {"cls": str(labels[i])} if i % 2 else {"json": json.dumps({"label": int(labels[i])})}
                members = {"png": image[: len(image) // 2] if i in broken else image, "txt": f" digit {i}\n", **label}
                for suffix, content in members.items():
                    content = content if isinstance(content, bytes) else content.encode()
                    member = tarfile.TarInfo(f"part/{i:04d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return str(folder)


def write_vae(folder, config: AutoencoderConfig = TINY_VAE) -> str:
    """A random autoencoder, as `convert` would write one."""
    import dataclasses

    params = jax.device_get(init_autoencoder(config, jax.random.key(0)))
    write_converted(folder, "sd_vae", dataclasses.asdict(config), {"file": "none"}, params)
    return str(folder)


def write_inception(folder) -> str:
    """Inception with the random weights of its goldens, as `convert` would write it."""
    shapes = json.loads(str(np.load(GOLDENS / "inception_fid.npz")["names_json"]))
    params = from_released(inception_table(), inception_weights(shapes), abstract_inception()[1])
    write_converted(folder, "fid_inception", {}, {}, params)
    return str(folder)
