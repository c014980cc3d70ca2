"""CIDEr of captions (Vedantam et al. 2015, arXiv 1411.5726), as the COCO evaluation counts it.

What that evaluation prints as CIDEr is the paper's CIDEr-D: a prediction's n-gram counts at most as much as the reference holds
it, and each reference weighs by a Gaussian of the difference in length (sigma 6), so that repeating a likely phrase gains
nothing. The value is ten times the mean over n = 1 .. 4 of the cosine of tf-idf vectors, mean over references and pictures.

An n-gram's idf is log(pictures / pictures that have it in a reference), taken from the evaluated pictures themselves: scores of
different sets can't be compared, and a set of one picture has the score 0.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.vision.caption_metrics.words import Ngrams, ngram_counts

ORDER = 4
_SIGMA = 6.0


def cider(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """0 .. 10, the mean over the pictures. Words of one prediction per picture, and of one or more references each."""
    scores = cider_of_each(predictions, references)
    return sum(scores) / len(scores)


def cider_of_each(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    counted = [[ngram_counts(reference, ORDER) for reference in own] for own in references]
    holders: Ngrams = Counter()
    for own in counted:
        holders.update({gram for counts in own for grams in counts for gram in grams})
    everyone = math.log(len(references))

    def vectors(counts: list[Ngrams]) -> "_Vectors":
        # An n-gram that no reference holds counts as rare as one that a single picture holds.
        weighed = [
            {gram: times * (everyone - math.log(max(1, holders[gram]))) for gram, times in grams.items()} for grams in counts
        ]
        # Lengths are counted in bigrams: of texts of two words or more the same differences as in words.
        return _Vectors(weighed, [math.sqrt(sum(v * v for v in vector.values())) for vector in weighed], counts[1].total())

    scores = []
    for prediction, own in zip(predictions, counted, strict=True):
        given = vectors(ngram_counts(prediction, ORDER))
        scores.append(10 * sum(_likeness(given, vectors(counts)) for counts in own) / len(own))
    return scores


@dataclass(frozen=True)
class _Vectors:
    weights: list[dict[tuple[str, ...], float]]  # by n - 1
    norms: list[float]
    length: int


def _likeness(given: _Vectors, reference: _Vectors) -> float:
    """Mean over n of the clipped cosine, 0 .. 1, less for another length."""
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(given.weights, reference.weights, given.norms, reference.norms, strict=True):
        if our_norm and their_norm:
            product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
            total += product / (our_norm * their_norm)
    return total / ORDER * math.exp(-((given.length - reference.length) ** 2) / (2 * _SIGMA**2))
