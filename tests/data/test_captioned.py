"""Sources with captions: digit pairs, and a folder with captions.jsonl."""

import json

import numpy as np
import pytest
from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data import tar_shards
from causalfusion_jax.data.caption_folder import read_captions
from causalfusion_jax.data.captions import check_captions, example_prompts
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digit_pairs import HELD_OUT_PAIRS, DigitPairsSource, digit_pairs, held_out_prompts
from causalfusion_jax.data.digits import digits
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.records import CorruptRecord
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.tokenizers import TextConfig, from_slots

TEXT = TextConfig("bytes", max_tokens=13)


def halves(split, examples):
    source = digit_pairs(split)
    rng = np.random.default_rng(0)
    for index in rng.choice(len(source), examples):
        example = source[int(index)]
        yield example["label"], np.split(example["image"], 2, axis=1)


@pytest.mark.parametrize("split", ["train", "held_out", "held_out_digits"])
def test_pairs_keep_digits_and_prompts_apart(split):
    """The halves of an image are digits of the right half of the data, of the classes that the label says."""
    own = digits("train" if split == "train" else "held_out")
    known = {image.tobytes(): label for image, label in zip(own.images, own.labels, strict=True)}
    seen = set()
    for label, (left, right) in halves(split, 300):
        pair = known[np.ascontiguousarray(left).tobytes()], known[np.ascontiguousarray(right).tobytes()]
        assert label == 10 * pair[0] + pair[1]
        seen.add(pair)
    if split == "train":
        assert not seen & set(HELD_OUT_PAIRS) and len(seen) > 80
    if split == "held_out":
        assert seen == set(HELD_OUT_PAIRS)


def test_pairs_are_all_there():
    source = DigitPairsSource("train")
    counts = np.bincount(digits("train").labels)
    assert len(source) == counts.sum() ** 2 - sum(counts[a] * counts[b] for a, b in HELD_OUT_PAIRS)
    assert source[0]["caption"] == "zero zero" and source[len(source) - 1]["caption"] == "nine nine"
    assert {left for left, _ in HELD_OUT_PAIRS} == {right for _, right in HELD_OUT_PAIRS} == set(range(10))
    assert held_out_prompts(12)[:2] == ["zero one", "one four"] and held_out_prompts(12)[10] == "zero one"


def test_batches_have_text():
    config = DataConfig(source="digit_pairs", image_size=8, image_width=16, num_classes=100)
    source = make_source(config, captions=True)
    batch = host_batches(source, config, 6, 0, text=TEXT)[3]
    assert batch["image"].shape == (6, 8, 16, 1) and batch["text"].shape == (6, 13)
    for text, label in zip(batch["text"], batch["label"], strict=True):
        assert from_slots(TEXT, text) == source.class_names[label]
    without = host_batches(make_source(config), config, 6, 0)[3]
    assert set(without) == {"image", "label", "corrupt"} and not without["corrupt"]
    np.testing.assert_array_equal(without["image"], batch["image"])


def write_folder(root, records):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), np.uint8)).save(root / f"{i}.png")
    (root / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_folder_with_captions(tmp_path):
    write_folder(tmp_path, [
        {"file_name": "0.png", "caption": "zero"}, {"file_name": "1.png", "caption": ["one", "uno"]},
    ])  # fmt: skip
    config = DataConfig(source="caption_folder", path=str(tmp_path), channels=3, num_classes=1)
    batches = host_batches(make_source(config, captions=True), config, 2, 0, text=TEXT)
    texts = set()
    with_close = BatchIterator(batches)
    for _ in range(12):
        batch = next(with_close)
        assert batch["image"].shape == (2, 8, 8, 3) and np.abs(batch["image"]).max() <= 1
        texts |= {from_slots(TEXT, text) for text in batch["text"]}
    with_close.close()
    assert texts == {"zero", "one", "uno"}


def test_captions_keep_their_line_separators(tmp_path):
    """A JSON file may hold U+2028, NEL and form feeds as they are; its lines end at line feeds alone."""
    caption = "one\u2028two\x85three\x0cfour"
    write_folder(tmp_path, [])
    record = json.dumps({"file_name": "0.png", "caption": caption}, ensure_ascii=False).replace("\\f", "\\u000c")
    (tmp_path / "captions.jsonl").write_bytes(f"{record}\r\n{record}\n".encode())
    assert read_captions(tmp_path, "data.path") == [("0.png", (caption,))] * 2
    (tmp_path / "captions.jsonl").write_bytes(record.encode("latin-1", "replace"))
    with pytest.raises(InputError, match="must be text in UTF-8"):
        read_captions(tmp_path, "data.path")


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("a\u2028b\x0cc\x85d\r\n\ne".encode())
    assert files.read_lines("x", path) == ["a\u2028b\x0cc\x85d", "", "e"]
    assert tar_shards.class_names(tmp_path) == ()
    path.rename(tmp_path / "classes.txt")
    assert len(tar_shards.class_names(tmp_path)) == 3
    path.write_bytes(b"")
    assert files.read_lines("x", path) == []


def test_undecodable_image_is_a_corrupt_record(tmp_path):
    write_folder(tmp_path, [{"file_name": f"{i}.png", "caption": f"image {i}"} for i in range(3)])
    (tmp_path / "0.png").write_bytes(b"no image")
    config = DataConfig(source="caption_folder", path=str(tmp_path), channels=3, num_classes=1, max_corrupt=1)
    iterator = BatchIterator(host_batches(make_source(config, captions=True), config, 2, 0, text=TEXT), max_corrupt=1)
    texts = {from_slots(TEXT, text) for _ in range(6) for text in next(iterator)["text"]}
    iterator.close()
    assert texts == {"image 1", "image 2"} and set(iterator.corrupt) == {str(tmp_path / "0.png")}
    source = make_source(config, captions=True)
    check_captions(source, TEXT)
    assert [from_slots(TEXT, text) for text in example_prompts(source, TEXT, 3)[0]] == ["image 1", "image 1", "image 2"]
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(CorruptRecord, match="not a readable image"):
        check_captions(source, TEXT)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"file_name": "0.png"}, "line 1 must be"),
        ({"file_name": "0.png", "caption": []}, "0.png has no caption"),
        ({"file_name": "0.png", "caption": ""}, "0.png has no caption"),
        ({"file_name": "9.png", "caption": "nine"}, "9.png.*no such file"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, record, problem):
    write_folder(tmp_path, [record])
    config = DataConfig(source="caption_folder", path=str(tmp_path), num_classes=1)
    with pytest.raises(InputError, match=problem):
        make_source(config, captions=True)
    (tmp_path / "captions.jsonl").unlink()
    with pytest.raises(InputError, match="captions.jsonl.*no such file"):
        make_source(config, captions=True)


def test_sources_without_captions_are_refused():
    with pytest.raises(InputError, match="has no captions"):
        make_source(DataConfig(), captions=True)
