"""BLEU-4 of captions over the whole corpus (Papineni et al. 2002), as the COCO evaluation counts it.

Not a mean over captions: n-grams are counted over all of them, each at most as often as one reference of its picture holds it.
The brevity penalty takes, per picture, the reference whose length is nearest (of two, the shorter). No smoothing: without a
single right 4-gram the score is 0.
"""

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_

from core.vision.caption_metrics.words import ngram_counts

ORDER = 4


def bleu_4(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """0 .. 1. Words of one prediction per picture, and of one or more references each."""
    right, given = [0] * ORDER, [0] * ORDER
    length = wanted = 0
    for prediction, own in zip(predictions, references, strict=True):
        length += len(prediction)
        wanted += min((len(reference) for reference in own), key=lambda n: (abs(n - len(prediction)), n))
        counted = [ngram_counts(reference, ORDER) for reference in own]
        for n, grams in enumerate(ngram_counts(prediction, ORDER)):
            allowed = reduce(or_, (counts[n] for counts in counted))  # the most that any one reference holds
            right[n] += (grams & allowed).total()
            given[n] += grams.total()
    if not all(right):
        return 0.0
    precision = math.exp(sum(math.log(hits / of) for hits, of in zip(right, given, strict=True)) / ORDER)
    return precision * min(1.0, math.exp(1 - wanted / length))
