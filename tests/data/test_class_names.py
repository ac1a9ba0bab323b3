"""The class names that a run keeps."""

import json

import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.class_names import check_class_names, names_difference, store_class_names, stored_class_names


def test_names_are_kept_and_compared(tmp_path):
    assert stored_class_names(tmp_path) == ()
    check_class_names(tmp_path, ("a", "b"))
    store_class_names(tmp_path, ("a", "b"))
    assert stored_class_names(tmp_path) == ("a", "b")
    for same in (("a", "b"), ()):
        check_class_names(tmp_path, same)
    for names, words in {
        ("a", "aa", "b"): "class 1 is 'b' in the run and 'aa' in the data", ("a", "b", "c"): "has 2 classes.* 3",
        ("b", "a"): "class 0",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_class_names(tmp_path, names)
    # Data that name no classes do not remove the names.
    store_class_names(tmp_path, ())
    assert stored_class_names(tmp_path) == ("a", "b")
    assert names_difference((), ("a",)) is None


@pytest.mark.parametrize("content", ['["a"', "{}", json.dumps([1, 2]), "null"])
def test_broken_names_are_refused(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InputError, match="classes.json cannot be read"):
        stored_class_names(tmp_path)
