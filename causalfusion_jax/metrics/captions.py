"""Scores of generated captions against references."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from causalfusion_jax.common.errors import require

MAX_NGRAM = 4
SIGMA = 6.0
"""Standard deviation of the penalty on a difference in length, in words (CIDEr-D)."""


def words(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation."""
    return re.findall(r"\w+(?:'\w+)*", caption.lower())


def ngrams(caption: str) -> list[Counter]:
    """Counts of all n-grams of words, for n = 1..MAX_NGRAM."""
    tokens = words(caption)
    return [Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, MAX_NGRAM + 1)]


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that equal one of their references."""
    _check(captions, references)
    return float(np.mean([caption in refs for caption, refs in zip(captions, references, strict=True)]))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 5), mean over the captions.

    N-grams are weighted by TF-IDF, with document frequencies counted over the references of the
    images; counts of a caption are clipped to those of the reference. Words are not stemmed. As
    published, scores are multiplied by 10; tables often show 100 times the unscaled value.

    Args:
      captions: one of each image.
      references: the references of each image.

    Raises:
      InputError: no captions, or an image without a reference.
    """
    _check(captions, references)
    counted = [[ngrams(ref) for ref in refs] for refs in references]
    document_frequency = [
        Counter(gram for refs in counted for gram in set().union(*(ref[n] for ref in refs))) for n in range(MAX_NGRAM)
    ]
    log_images = math.log(len(references))

    def vector(counts: Counter, n: int) -> dict:
        return {
            gram: count * (log_images - math.log(max(1, document_frequency[n][gram]))) for gram, count in counts.items()
        }

    def norm(v: dict) -> float:
        return math.sqrt(sum(x * x for x in v.values()))

    scores = []
    for caption, refs, ref_counts in zip(captions, references, counted, strict=True):
        counts = ngrams(caption)
        total = 0.0
        for ref, ref_count in zip(refs, ref_counts, strict=True):
            penalty = math.exp(-((len(words(caption)) - len(words(ref))) ** 2) / (2 * SIGMA**2))
            for n in range(MAX_NGRAM):
                ours, theirs = vector(counts[n], n), vector(ref_count[n], n)
                norms = norm(ours) * norm(theirs)
                overlap = sum(min(x, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, x in ours.items())
                total += penalty * overlap / norms if norms else 0.0
        scores.append(10.0 * total / MAX_NGRAM / len(refs))
    return float(np.mean(scores))


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `cider` of captions."""
    return {"exact_match": exact_match(captions, references), "cider": cider(captions, references)}


def bits_per_token(log_probs: np.ndarray, counted: np.ndarray) -> float:
    """Mean bits of the `counted` tokens, from natural log-probabilities of the same shape."""
    return float(-np.sum(log_probs[counted]) / np.sum(counted) / math.log(2))


def _check(captions, references) -> None:
    require(len(captions) > 0, "captions", len(captions), "there are none")
    require(len(references) == len(captions), "references", len(references), f"must be {len(captions)}, as captions")
    for refs in references:
        require(len(refs) > 0, "references", refs, "every image needs at least one reference caption")
