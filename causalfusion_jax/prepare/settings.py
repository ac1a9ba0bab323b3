"""Settings of encoding a data set, in a module that imports no network: the command derives its flags from them."""

import dataclasses

from causalfusion_jax.common.errors import require_number


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How latents are computed and written.

    Attributes:
      batch_size: images encoded at a time, over the devices of a host.
      micro_batch: images in a device's memory at a time.
      records_per_shard: images in a file.
      captions: store captions too.
    """

    batch_size: int = 64
    micro_batch: int = 16
    records_per_shard: int = 8192
    captions: bool = False

    def __post_init__(self):
        for name in ("batch_size", "micro_batch", "records_per_shard"):
            require_number(name, getattr(self, name), 1)
