"""Classes by name."""

import pytest

from causalfusion_jax.data.pipeline import DataConfig, class_names
from causalfusion_jax.errors import InputError
from causalfusion_jax.sampling.labels import parse_labels

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


def test_imagenet_by_name():
    data = DataConfig(source="arrays", name="imagenet2012", latents=True, channels=4, num_classes=1000, image_size=32)
    assert parse_labels("golden retriever,otter", 1000, lambda: class_names(data)).tolist() == [207, 360]
