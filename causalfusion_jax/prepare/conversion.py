"""The kinds of released checkpoints: how to recognise one, its names, and this package's parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from causalfusion_jax.common.errors import InputError, require_one_of
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.i3d import abstract_i3d
from causalfusion_jax.models.inception import abstract_inception
from causalfusion_jax.models.transformer import abstract_model
from causalfusion_jax.prepare import (
    names,
    released_autoencoders,
    released_i3d,
    released_inception,
    released_transformers,
)
from causalfusion_jax.prepare.exported import Exported
from causalfusion_jax.prepare.released_transformers import Geometry, Shapes

Settings = Mapping[str, Any]
"""Settings of a converted checkpoint: of a transformer the sections of its config."""

Network = Callable[[Settings], TransformerConfig]
"""The network of the sections of a config; passed in, because configs are in a higher layer."""


class ConversionPlan(NamedTuple):
    """How a checkpoint becomes parameters; made from names and shapes alone.

    Attributes:
      settings: plain values to store with the parameters.
      table: released and own names of every array.
      shapes: the parameters as jax.ShapeDtypeStruct.
      ignored: released names that are not used.
    """

    settings: dict[str, Any]
    table: names.Table
    shapes: Any
    ignored: list[str]


class Kind(NamedTuple):
    """A kind of released checkpoint.

    Attributes:
      plan: recognises a released checkpoint by its names and shapes; arguments as of `make_plan`.
      export: table and shapes of parameters with the given settings; arguments as of `export_table`.
    """

    plan: Callable[[Shapes, Mapping[str, Any], Geometry, Network], ConversionPlan]
    export: Callable[[Settings, TransformerConfig | None], tuple[names.Table, Any]]


def _transformer(recognise, table) -> Kind:
    def plan(shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry, network: Network) -> ConversionPlan:
        sections = recognise(shapes, metadata, geometry)
        model = network(sections)
        return ConversionPlan(sections, table(model), abstract_model(model)[1], [])

    return Kind(plan, lambda settings, model: (table(model), abstract_model(model)[1]))


def _autoencoder(recognise, table) -> Kind:
    def plan(shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry, network: Network) -> ConversionPlan:
        del metadata, network
        _refuse(geometry)
        config = recognise(shapes)
        ignored = released_autoencoders.ignored_names(shapes)
        return ConversionPlan(
            dataclasses.asdict(config), table(config, shapes), abstract_autoencoder(config)[1], ignored
        )

    def export(settings: Settings, model: TransformerConfig | None) -> tuple[names.Table, Any]:
        del model
        config = autoencoder_config(settings)
        return table(config), abstract_autoencoder(config)[1]

    return Kind(plan, export)


def _fixed(abstract, table, ignored, recognise=None) -> Kind:
    """A network without settings, whose released names may have several layouts."""

    def plan(shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry, network: Network) -> ConversionPlan:
        del metadata, network
        _refuse(geometry)
        layout = () if recognise is None else (recognise(shapes),)
        return ConversionPlan({}, table(*layout), abstract()[1], ignored(*layout))

    return Kind(plan, lambda settings, model: (table(), abstract()[1]))


def _refuse(geometry: Geometry) -> None:
    """Raises InputError if any geometry is given."""
    for name, value in geometry.items():
        if value is not None:
            raise InputError(f"--{name}", value, "has no meaning for this kind; leave it out")


KINDS = {
    "causalfusion": _transformer(released_transformers.causalfusion_config, released_transformers.causalfusion_table),
    "acdit": _transformer(released_transformers.acdit_config, released_transformers.acdit_table),
    "mar_vae": _autoencoder(released_autoencoders.mar_vae_config, released_autoencoders.mar_vae_table),
    "sd_vae": _autoencoder(released_autoencoders.sd_vae_config, released_autoencoders.sd_vae_table),
    "fid_inception": _fixed(abstract_inception, released_inception.inception_table, released_inception.ignored_names),
    "fvd_i3d": _fixed(abstract_i3d, released_i3d.i3d_table, released_i3d.ignored_names, released_i3d.recognise),
}


def autoencoder_config(settings: Settings) -> AutoencoderConfig:
    """An autoencoder's config from its settings as stored in JSON. Raises TypeError for unknown settings."""
    return AutoencoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def make_plan(
    kind: str, shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry, network: Network
) -> ConversionPlan:
    """Recognises a released checkpoint and checks every name and shape; reads no weights.

    Args:
      kind: one of KINDS.
      shapes: names and shapes in the checkpoint.
      metadata: plain values in it.
      geometry: what the user gives of the token grid.
      network: the network of the sections of a config.

    Raises:
      InputError: it is not a checkpoint of this kind, or a name or shape is wrong.
    """
    require_one_of("--kind", kind, KINDS)
    plan = KINDS[kind].plan(shapes, metadata, geometry, network)
    names.check_shapes(plan.table, shapes, plan.ignored)
    return plan


def plan_of_exported(exported: Exported, shapes: Shapes, model: TransformerConfig | None) -> ConversionPlan:
    """The plan of a file that this package exported, with the settings in its metadata.

    Args:
      exported: the metadata; its kind is one of KINDS.
      shapes: names and shapes of the arrays.
      model: the network of its settings, for a transformer.

    Raises:
      InputError: settings of another kind, or a wrong name or shape.
    """
    try:
        table, params = export_table(exported.kind, exported.settings, model)
    except TypeError as error:
        raise InputError("--checkpoint", "__metadata__", f"holds no settings of a {exported.kind}: {error}") from None
    names.check_shapes(table, shapes)
    return ConversionPlan(exported.settings, table, params, [])


def export_table(kind: str, settings: Settings, model: TransformerConfig | None) -> tuple[names.Table, Any]:
    """Released names of the parameters of a kind, and their shapes.

    Args:
      kind: one of KINDS.
      settings: of a converted checkpoint.
      model: the network, for a transformer.

    Raises:
      InputError: the network does not have the released architecture.
    """
    return KINDS[kind].export(settings, model)
