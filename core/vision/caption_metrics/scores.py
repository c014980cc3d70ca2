"""The scores of generated captions against what people wrote, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.vision.caption_metrics.bleu import bleu_4
from core.vision.caption_metrics.cider import cider
from core.vision.caption_metrics.rouge import rouge_l
from core.vision.caption_metrics.words import TOKENIZER, words


@dataclass(frozen=True)
class CaptionScores:
    bleu_4: float  # 0 .. 1
    rouge_l: float  # 0 .. 1
    cider: float  # 0 .. 10
    tokenizer: str  # what told the words apart: scores under different names are different metrics


def score_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Of one prediction per picture, and one or more references each.

    An empty prediction is a bad caption, not an error. Raises ValueError for no pictures, another number of references, or a
    reference without a word, naming the pictures (from 1).
    """
    tokens = [[words(reference) for reference in own] for own in references]
    return score_words([words(prediction) for prediction in predictions], tokens, TOKENIZER)


def score_words(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], tokenizer: str
) -> CaptionScores:
    """The same of texts that `tokenizer` has cut into words before."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for the references of {len(references)} pictures can't be scored")
    bare = [number for number, own in enumerate(references, start=1) if not own or not all(own)]
    if bare:
        raise ValueError(f"{len(bare)} pictures, number {bare[0]} the first, have no reference or one without a word")
    return CaptionScores(
        bleu_4=bleu_4(predictions, references),
        rouge_l=rouge_l(predictions, references),
        cider=cider(predictions, references),
        tokenizer=tokenizer,
    )
