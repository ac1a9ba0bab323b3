"""Accelerators and the names of slices."""

import pytest

from causalfusion_jax.common import hardware
from causalfusion_jax.common.errors import InputError


@pytest.mark.parametrize(
    ("name", "devices", "links"),
    [
        # A pod of v5e is a torus: all four links of 50 GB/s. Smaller slices are meshes: one link an axis.
        ("v5e:16x16", 256, 200e9), ("v5e:4x4", 16, 100e9), ("v5e:8x16", 128, 150e9), ("v5e:1x1", 1, 0),
        ("v6e:4x4", 16, 200e9),
        # Cubes of v5p are tori of three axes, six links of 100 GB/s.
        ("v5p:4x4x4", 64, 600e9), ("v5p:2x2x4", 16, 300e9), ("v5p:2x2x1", 4, 200e9), ("V4:4x4x8 ", 128, 300e9),
    ],
)  # fmt: skip
def test_topologies(name, devices, links):
    topology = hardware.topology(name)
    assert (topology.devices, topology.link_bandwidth) == (devices, links)
    assert topology.name == name.strip().lower()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5e:16*16", "did you mean v5e:16x16"), ("v5e-256", "did you mean v5e:16x16"),
        ("v5litepod-16", "did you mean v5e:4x4"), ("v5p-32", "did you mean v5p:2x2x4"),
        ("v9:4x4", "must be GENERATION"),
        ("v5e:2x2x1", "v5e has"), ("v5p:4x4", "v5p has"), ("v5e:0x4", "v5e has"), ("H100", "GENERATION:SHAPE"),
    ],
)  # fmt: skip
def test_other_names_are_refused_with_a_hint(name, hint):
    with pytest.raises(InputError, match="topology") as error:
        hardware.topology(name)
    assert hint in str(error.value)


def test_device_kinds_are_distinguished():
    kinds = [kind for a in hardware.ACCELERATORS for kind in a.device_kinds]
    assert len(set(kinds)) == len(kinds)
    assert hardware.by_device_kind("TPU v5 lite").name == "v5e" and hardware.by_device_kind("TPU v5").name == "v5p"
    assert hardware.by_device_kind("cpu") is None
