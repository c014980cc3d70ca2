"""VQA accuracy (Antol et al. 2015): an answer is right as far as people gave it.

An answer that three people gave is wholly right. As each person is measured against the others in the same way, the score is
the mean over all subsets with one person left out: of ten people, min(1, how many of the other nine gave it / 3).

The official program compares answers as they are where all ten agree to the letter; here they are always put into the form of
`vqa_answers` first, so that "Yes." is right there too.
"""

from collections.abc import Sequence

from core.vision.caption_metrics.vqa_answers import comparable

ENOUGH = 3
"""People who make an answer wholly right."""


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 .. 1 of one prediction; `answers` are what people said, ten in the official sets.

    With fewer people, as in data of one's own, an answer that all the others gave is wholly right: of a single answer, it is
    equality. Raises ValueError without any.
    """
    if not answers:
        raise ValueError("a question without a single answer can't be scored")
    given = comparable(prediction)
    same = [comparable(answer) == given for answer in answers]
    if len(same) == 1:
        return float(same[0])
    enough = min(ENOUGH, len(same) - 1)
    return sum(min(1.0, (sum(same) - own) / enough) for own in same) / len(same)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """0 .. 1, the mean over the questions. Raises ValueError for none, another number of both, or a question without answers."""
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for the answers to {len(answers)} questions can't be scored")
    bare = [number for number, own in enumerate(answers, start=1) if not own]
    if bare:
        raise ValueError(f"{len(bare)} questions, number {bare[0]} the first, have no answer to be compared with")
    return sum(map(answer_accuracy, predictions, answers)) / len(predictions)
