"""Settings of the training data, checked against their source."""

import dataclasses

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.data.registry import SOURCES
from causalfusion_jax.data.source import DataSettings, SourceKind

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataSettings)}


@dataclasses.dataclass(frozen=True)
class DataConfig(DataSettings):
    """Settings of the training data that fit their source.

    Attributes: see DataSettings.

    Raises:
      InputError: a value that the source does not allow.
    """

    def __post_init__(self):
        require_one_of("source", self.source, SOURCES)
        require_number("image_size", self.image_size, 1)
        require_number("image_width", self.image_width, 0)
        if self.latents:
            require_number("channels", self.channels, 1)
        else:
            require_one_of("channels", self.channels, (1, 3))
        require_number("frames", self.frames, 1)
        require_number("frame_stride", self.frame_stride, 1)
        require_number("num_classes", self.num_classes, 1)
        require_number("workers", self.workers, 0)
        require_number("max_corrupt", self.max_corrupt, 0)
        for name in sorted({name for kind in SOURCES.values() for name in kind.own} - set(self.kind.own)):
            owners = [kind.name for kind in SOURCES.values() if name in kind.own]
            value = getattr(self, name)
            require(value == _DEFAULTS[name], name, value, f"is a setting of source {' or '.join(owners)} only")
        require(self.frame_stride == 1 or self.frames > 1, "frame_stride", self.frame_stride, "is a setting of videos")
        for name, fixed in self.kind.fixed.items():
            value = getattr(self, name)
            require(value == fixed, name, value, f"must be {fixed!r} for source {self.source}")
        self.kind.check(self)

    @property
    def kind(self) -> SourceKind:
        """The entry of the source."""
        return SOURCES[self.source]
