"""Classes by name."""

import pytest

from causalfusion_jax.cli.condition_flags import parse_labels
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.registry import class_names
from causalfusion_jax.sampling.trained import Trained

NAMES = ("golden retriever", "tench, Tinca tinca", "otter", "crane", "crane", "lesser_panda")


def labels(text, names=NAMES):
    return parse_labels(text, len(NAMES), lambda: names).tolist()


def test_names_and_numbers():
    assert labels("golden retriever,otter, 4 ,Tinca tinca,Golden-Retriever,lesser panda") == [0, 2, 4, 1, 0, 5]

    def fail():
        raise AssertionError("numbers need no names")

    assert parse_labels("3,0", 4, fail).tolist() == [3, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("goldn retriever", ["goldn retriever", "did you mean golden retriever?"]), ("crane", ["classes 3, 4"]),
        ("6", ["0..5"]), ("-1", ["0..5"]), (" , ", ["at least one"]),
    ],
)  # fmt: skip
def test_what_is_no_class_is_refused(text, words):
    with pytest.raises(InputError) as error:
        labels(text)
    assert error.value.field == "--labels" and all(word in str(error.value) for word in words)


def test_without_names_there_are_numbers():
    with pytest.raises(InputError, match="class numbers in 0..5"):
        labels("otter", ())


def test_a_name_beyond_the_trained_classes_is_refused():
    """Of a run that keeps no names, whose data got a class since."""
    with pytest.raises(InputError, match="class 2 of the data, which the model was not trained on.*0..1") as error:
        parse_labels("b", 2, lambda: ("a", "aa", "b"), "--label")
    assert error.value.field == "--label"


def test_a_folder_with_another_number_of_classes_names_none(tmp_path):
    for name in ("a", "aa", "b"):
        (tmp_path / name).mkdir()
    data = DataConfig(source="image_folder", path=str(tmp_path), num_classes=2)
    with pytest.raises(InputError, match="--labels='b': the run keeps no class names.*has 3 class folders"):
        parse_labels("b", 2, lambda: class_names(data))


def test_kept_names_need_no_data(tmp_path):
    config = experiment.from_dict(dict(data=dict(source="image_folder", path=str(tmp_path / "moved"), num_classes=2)))
    trained = Trained(config, {}, dict, "", ("a", "b"))
    assert parse_labels("b,a", 2, trained.read_class_names).tolist() == [1, 0]
    unnamed = trained._replace(class_names=())
    with pytest.raises(InputError) as error:
        parse_labels("b", 2, unnamed.read_class_names)
    assert error.value.field == "--labels" and "0..1" in str(error.value) and "--data" not in str(error.value)


def test_imagenet_by_name():
    data = DataConfig(source="arrays", name="imagenet2012", latents=True, channels=4, num_classes=1000, image_size=32)
    assert parse_labels("golden retriever,otter", 1000, lambda: class_names(data)).tolist() == [207, 360]
