"""ROUGE-L of captions (Lin 2004), as the COCO evaluation counts it.

Of a caption, the precision and the recall of the longest common subsequence are each the best over the references, and recall
weighs 1.2² times as much. `core.eval.scores` has the other ROUGE-L, of answers with one reference and equal weights.
"""

from collections.abc import Sequence

_BETA = 1.2


def rouge_l(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """0 .. 1, the mean over the pictures. Words of one prediction per picture, and of one or more references each."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(caption_rouge_l(prediction, own) for prediction, own in pairs) / len(pairs)


def caption_rouge_l(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    common = [_longest_common(prediction, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of the table of prefixes."""
    row = [0] * (len(right) + 1)
    for word in left:
        above = row
        row = [0]
        for place, other in enumerate(right):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
    return row[-1]
