"""What each kind of released checkpoint is: how to recognise it, its names, our parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from causalfusion_jax.common.errors import InputError, require_one_of
from causalfusion_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder
from causalfusion_jax.models.i3d import abstract_i3d
from causalfusion_jax.models.inception import abstract_inception
from causalfusion_jax.models.transformer import TransformerConfig, abstract_model
from causalfusion_jax.prepare import (
    names,
    released_autoencoders,
    released_i3d,
    released_inception,
    released_transformers,
)
from causalfusion_jax.prepare.exported import TRANSFORMERS, Exported
from causalfusion_jax.prepare.released_transformers import Geometry, Shapes


class Plan(NamedTuple):
    """How a checkpoint becomes our parameters; made from names and shapes alone.

    Attributes:
      settings: what is written beside the parameters, as plain values.
      table: every array, released and ours.
      shapes: our parameters as jax.ShapeDtypeStruct.
      ignored: released names that are not used.
    """

    settings: dict[str, Any]
    table: names.Table
    shapes: Any
    ignored: list[str]


Network = Callable[[Mapping[str, Any]], TransformerConfig]
"""The network of the sections of a config; given from above, where configs live."""


def _transformer(recognise, table):
    def plan(shapes: Shapes, metadata, geometry: Geometry, network: Network) -> Plan:
        sections = recognise(shapes, metadata, geometry)
        model = network(sections)
        return Plan(sections, table(model), abstract_model(model)[1], [])

    return plan


def _autoencoder(recognise, table):
    def plan(shapes: Shapes, metadata, geometry: Geometry, network: Network) -> Plan:
        del metadata, network
        _refuse(geometry)
        config: AutoencoderConfig = recognise(shapes)
        ignored = released_autoencoders.ignored_names(shapes)
        return Plan(dataclasses.asdict(config), table(config, shapes), abstract_autoencoder(config)[1], ignored)

    return plan


def _inception(shapes: Shapes, metadata, geometry: Geometry, network: Network) -> Plan:
    del shapes, metadata, network
    _refuse(geometry)
    return Plan({}, released_inception.inception_table(), abstract_inception()[1], released_inception.ignored_names())


def _i3d(shapes: Shapes, metadata, geometry: Geometry, network: Network) -> Plan:
    del metadata, network
    _refuse(geometry)
    release = released_i3d.recognise(shapes)
    return Plan({}, released_i3d.i3d_table(release), abstract_i3d()[1], released_i3d.ignored_names(release))


def _refuse(geometry: Geometry) -> None:
    for name, value in geometry.items():
        if value is not None:
            raise InputError(f"--{name}", value, "has no meaning for this kind; leave it out")


KINDS = {
    "causalfusion": _transformer(released_transformers.causalfusion_config, released_transformers.causalfusion_table),
    "acdit": _transformer(released_transformers.acdit_config, released_transformers.acdit_table),
    "mar_vae": _autoencoder(released_autoencoders.mar_vae_config, released_autoencoders.mar_vae_table),
    "sd_vae": _autoencoder(released_autoencoders.sd_vae_config, released_autoencoders.sd_vae_table),
    "fid_inception": _inception,
    "fvd_i3d": _i3d,
}


def make_plan(kind: str, shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry, network: Network) -> Plan:
    """Recognises a released checkpoint and checks every name and shape; reads no weights.

    Args:
      kind: one of KINDS.
      shapes: names and shapes in the checkpoint.
      metadata: plain values in it.
      geometry: what the user says of the token grid.
      network: the network of the sections of a config.

    Raises:
      InputError: it is not a checkpoint of this kind, or a name or shape is wrong.
    """
    require_one_of("--kind", kind, KINDS)
    plan = KINDS[kind](shapes, metadata, geometry, network)
    names.check_shapes(plan.table, shapes, plan.ignored)
    return plan


def plan_of_exported(exported: Exported, shapes: Shapes, model: TransformerConfig | None) -> Plan:
    """The plan of a file that this package exported: its settings are those it was exported with.

    Args:
      exported: what the file says of itself, its kind one of KINDS.
      shapes: names and shapes of its arrays.
      model: the network of its settings, for a transformer.

    Raises:
      InputError: settings that are none of this kind, or a name or shape is wrong.
    """
    try:
        table, params = export_table(exported.kind, exported.settings, model)
    except TypeError as error:
        raise InputError("--checkpoint", "__metadata__", f"holds no settings of a {exported.kind}: {error}") from None
    names.check_shapes(table, shapes)
    return Plan(exported.settings, table, params, [])


def export_table(kind: str, settings: Mapping[str, Any], model: TransformerConfig | None) -> tuple[names.Table, Any]:
    """Released names, and our shapes, of parameters of a kind.

    Args:
      kind: one of KINDS.
      settings: of a converted checkpoint.
      model: the network, for a transformer.

    Raises:
      InputError: the network is not of the released architecture.
    """
    if kind in TRANSFORMERS:
        table = (
            released_transformers.causalfusion_table if kind == "causalfusion" else released_transformers.acdit_table
        )
        return table(model), abstract_model(model)[1]
    if kind == "fid_inception":
        return released_inception.inception_table(), abstract_inception()[1]
    if kind == "fvd_i3d":
        return released_i3d.i3d_table(), abstract_i3d()[1]
    config = AutoencoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    table = released_autoencoders.mar_vae_table if kind == "mar_vae" else released_autoencoders.sd_vae_table
    return table(config), abstract_autoencoder(config)[1]
