"""Text to tokens and back."""

import numpy as np
import pytest
from tiny_data import write_tokenizer

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.data.captions import check_captions, tokenize
from causalfusion_jax.data.tokenizers import (
    BEGIN,
    END,
    NUM_SPECIAL,
    TextConfig,
    from_slots,
    make_tokenizer,
    to_slots,
    with_checksum,
)

BYTES = TextConfig("bytes", max_tokens=40)


@pytest.mark.parametrize("text", ["three seven", "  two  spaces\n", "Ünïcödé 七 🙂", "\x00\x01", "a"])
def test_bytes_come_back_as_they_were(text):
    slots = to_slots(BYTES, text)
    assert slots.shape == (40,) and slots.dtype == np.int32 and slots[0] == BEGIN
    assert from_slots(BYTES, slots) == text
    assert make_tokenizer(BYTES).vocab_size == 258 and slots.max() < 258


def test_slots():
    config = TextConfig("bytes", max_tokens=4)
    a, b = NUM_SPECIAL + ord("a"), NUM_SPECIAL + ord("b")
    np.testing.assert_array_equal(to_slots(config, "ab"), [BEGIN, a, b, END])
    np.testing.assert_array_equal(to_slots(config, "a"), [BEGIN, a, END, NO_TOKEN])
    np.testing.assert_array_equal(to_slots(config, "a", ended=False), [BEGIN, a, NO_TOKEN, NO_TOKEN])
    np.testing.assert_array_equal(to_slots(config, ""), [NO_TOKEN] * 4)
    np.testing.assert_array_equal(to_slots(config, "", ended=False), [BEGIN] + [NO_TOKEN] * 3)
    # What is cut has no end.
    np.testing.assert_array_equal(to_slots(config, "abc", cut=True), [BEGIN, a, b, NUM_SPECIAL + ord("c")])
    with pytest.raises(InputError, match="has 5 tokens.*takes 4"):
        to_slots(config, "abc")


def test_files_of_libraries(tmp_path):
    """A tokenizer trained here by each library reads its own file back."""
    sentencepiece, tokenizers = pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    corpus = ["three seven", "seven three", "one two three"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "piece"), vocab_size=24, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["?"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    trained.save(str(tmp_path / "tokenizer.json"))
    for kind, file in (("sentencepiece", "piece.model"), ("huggingface", "tokenizer.json")):
        config = TextConfig(kind, str(tmp_path / file), 20)
        slots = to_slots(config, "seven three one")
        assert from_slots(config, slots) == "seven three one"
        assert slots.max() < make_tokenizer(config).vocab_size
        (tmp_path / "broken").write_text("not one")
        with pytest.raises(InputError, match="is not a"):
            make_tokenizer(TextConfig(kind, str(tmp_path / "broken")))


def test_padding_and_truncation_of_the_file_are_left_out(tmp_path):
    """As they are stored in a tokenizer.json by many published models."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<pad>": 0, "three": 1, "seven": 2}
    stored = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    stored.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    stored.enable_padding(length=6, pad_id=0, pad_token="<pad>")
    stored.enable_truncation(max_length=2)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(TextConfig("huggingface", str(tmp_path / "tokenizer.json"), 9))
    assert tokenizer.encode("three seven three seven") == [3, 4, 3, 4]
    assert tokenizer.encode("three") == [3]


def test_another_file_than_the_one_kept_is_refused(tmp_path):
    words = TextConfig("huggingface", write_tokenizer(tmp_path / "tokenizer.json", "three", "seven"), 6)
    kept = with_checksum(words)
    assert len(kept.checksum) == 64 and make_tokenizer(kept).vocab_size == 4
    write_tokenizer(tmp_path / "tokenizer.json", "seven", "three")
    make_tokenizer.cache_clear()
    with pytest.raises(InputError, match="text.path=.*is another file than the run began with"):
        make_tokenizer(kept)
    assert make_tokenizer(with_checksum(words)).encode("three") == [3]
    assert with_checksum(BYTES) == BYTES
    with pytest.raises(InputError, match="has no file"):
        TextConfig("bytes", checksum="1")


def test_bad_settings(tmp_path):
    for bad in (dict(tokenizer="letters"), dict(tokenizer="sentencepiece"), dict(tokenizer="bytes", path="x")):
        with pytest.raises(InputError):
            TextConfig(**bad)
    with pytest.raises(InputError, match="no such file"):
        make_tokenizer(TextConfig("sentencepiece", str(tmp_path / "nothing")))


def test_a_missing_library_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "some.model").write_text("x")
    with pytest.raises(InputError, match=r"pip install 'causalfusion_jax\[text\]'"):
        make_tokenizer(TextConfig("sentencepiece", str(tmp_path / "some.model"), 7))


def test_captions_of_examples():
    example = {"image": np.zeros(1), "caption": "seven"}
    assert set(tokenize(example, BYTES)) == {"image", "text"}
    with pytest.raises(InputError, match="has no caption"):
        tokenize({"image": np.zeros(1)}, BYTES)
    with pytest.raises(InputError, match="first example.*no caption"):
        check_captions([{"image": np.zeros(1)}], BYTES)
