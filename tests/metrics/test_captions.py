"""Scores of captions against the definitions, written out without a shared line."""

import collections
import math

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.metrics.captions import bits_per_token, cider, exact_match, score_captions, words


def brute_force_cider(captions, references):
    """CIDEr-D by its equations, n-grams as strings, vectors over the whole vocabulary."""

    def grams(text, n):
        tokens = text.lower().split()
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    images = len(captions)
    scores = np.zeros(images)
    for n in (1, 2, 3, 4):
        vocabulary = sorted(
            {g for refs in references for ref in refs for g in grams(ref, n)}
            | {g for caption in captions for g in grams(caption, n)}
        )
        if not vocabulary:
            continue
        containing = [sum(any(g in grams(ref, n) for ref in refs) for refs in references) for g in vocabulary]
        idf = np.log(images) - np.log(np.maximum(1, containing))

        def counts(text, n=n, vocabulary=vocabulary):
            occurrences = collections.Counter(grams(text, n))
            return np.array([occurrences[g] for g in vocabulary], float)

        for i in range(images):
            for ref in references[i]:
                c, r = counts(captions[i]) * idf, counts(ref) * idf
                size = np.linalg.norm(c) * np.linalg.norm(r)
                cosine = np.minimum(c, r) @ r / size if size else 0.0
                gap = len(captions[i].split()) - len(ref.split())
                scores[i] += cosine * math.exp(-gap * gap / 72) * 10 / 4 / len(references[i])
    return scores.mean()


def test_cider_is_its_equations():
    rng = np.random.default_rng(0)
    vocabulary = ["a", "the", "cat", "dog", "sits", "runs", "on", "under", "mat", "tree", "red", "blue"]

    def sentence():
        return " ".join(rng.choice(vocabulary, rng.integers(1, 9)))

    for _ in range(10):
        references = [[sentence() for _ in range(rng.integers(1, 5))] for _ in range(6)]
        captions = [refs[0] if rng.integers(2) else sentence() for refs in references]
        np.testing.assert_allclose(cider(captions, references), brute_force_cider(captions, references), rtol=1e-9)


def test_cider_by_hand():
    """Two images that share nothing: a copy of the reference has cosine 1 in all four n, so 10."""
    references = [["a b c d"], ["e f g h"]]
    assert cider(["a b c d", "e f g h"], references) == pytest.approx(10.0)
    assert cider(["e f g h", "a b c d"], references) == 0.0
    # One word of four for each, one of four n, and the penalty of three words fewer.
    assert cider(["a", "e"], references) == pytest.approx(10 / 4 * (1 / 2) * math.exp(-9 / 72))
    # What every image's references say counts nothing.
    assert cider(["a b", "a b"], [["a b"], ["a b"]]) == 0.0
    assert words("The cat's mat, RED.") == ["the", "cat's", "mat", "red"]


def test_exact_match_and_bits():
    assert exact_match(["a b", "c"], [["x", "a b"], ["C"]]) == 0.5
    assert bits_per_token(np.log([[0.5, 0.25, 0.1]]), np.array([[True, True, False]])) == pytest.approx(1.5)


def test_missing_references_are_refused():
    for captions, references in ((["a"], [[]]), ([], []), (["a"], [])):
        with pytest.raises(InputError):
            score_captions(captions, references)
