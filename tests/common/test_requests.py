"""Requests are compared value by value, and their differences named."""

import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.requests import differences, plain, require_same

STORED = {"seed": 3, "sampler": {"solver_steps": 8, "cfg_interval": [0.0, float("inf")]}, "labels": [0, 1]}


def test_what_was_read_back_from_json_is_the_same():
    wanted = STORED | {"sampler": {"solver_steps": 8, "cfg_interval": (0.0, float("inf"))}, "labels": (0, 1)}
    assert plain(wanted) == STORED
    assert differences(STORED, wanted) == []
    require_same("--out", "folder", STORED, wanted, "holds another request")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "seed 3, now 4"),
        ({"sampler": STORED["sampler"] | {"solver_steps": 9}}, "sampler.solver_steps 8, now 9"),
        ({"prompts": ["two"]}, "prompts not set, now ['two']"),
        ({"labels": list(range(100))}, "labels"),
        ({"sampler": {}}, "sampler not set, now {}; sampler.solver_steps 8, now not set; "),
    ],
)
def test_what_differs_is_named(change, words):
    with pytest.raises(InputError) as error:
        require_same("--out", "folder", STORED, STORED | change, "holds another request", "remove it")
    assert error.value.field == "--out" and error.value.allowed.startswith(f"holds another request ({words}")
    assert error.value.allowed.endswith("); remove it")


@pytest.mark.parametrize("stored", [None, "text", [1]])
def test_without_a_stored_request_it_is_other_content(stored):
    with pytest.raises(InputError, match="exists with other content; give a new or empty folder"):
        require_same("--out", "folder", stored, STORED, "holds another request")
