"""How near answers come to the answers that stand in the data: exact match, BLEU and ROUGE-L.

BLEU (Papineni et al. 2002) is sacrebleu's over the whole corpus, one reference each, its defaults; the signature is

    nrefs:1|case:mixed|eff:no|tok:<tokenisation>|smooth:exp|version:2.6.0

with `13a`, or `zh` (each Chinese character a word) where the references are mostly Chinese, or `char` (every character a
word) where they are mostly Japanese, whose words no tokeniser here can tell. References alone decide, so all evaluations of a
run are counted alike. As everywhere, answers of fewer than four words have no 4-grams: where all are so short, BLEU is 0 even
for perfect ones, and exact match is the metric to go by.

ROUGE-L (Lin 2004) is rouge-score's F1, without stemming, mean over the answers. rouge-score's own words are runs of a to z and
0 to 9, so of Chinese it sees nothing; the words here are the same for English, and any script's otherwise.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer as RougeTokenizer
from sacrebleu.metrics import BLEU

LONGEST = 2048
"""Words of a text that ROUGE-L looks at. Time and memory go by the product of both lengths: here a second at most."""

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_KANA = ((0x3041, 0x30FF), (0x31F0, 0x31FF))


@dataclass(frozen=True)
class Scores:
    exact_match: float  # share of answers that equal their reference but for white space around them, 0 .. 1
    bleu: float  # 0 .. 100
    rouge_l: float  # 0 .. 1
    signature: str  # sacrebleu's, which says how the BLEU was made


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Scores of answers against one reference each. Raises ValueError when there are none, or not as many of both."""
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers to {len(references)} references can't be scored")
    pairs = list(zip(answers, references, strict=True))
    # `force` is not about the number: it silences a remark about texts that end in " .".
    bleu = BLEU(tokenize=_tokenisation(references), force=True)
    found = bleu.corpus_score(list(answers), [list(references)])
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    return Scores(
        exact_match=sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs),
        bleu=float(found.score),
        rouge_l=sum(rouge.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs) / len(pairs),
        signature=str(bleu.get_signature()),
    )


class _Words(RougeTokenizer):
    """Lower-case runs of letters, digits and their accents; each Chinese or Japanese character a word of its own."""

    def tokenize(self, text: str) -> list[str]:
        spaced = (
            f" {character} " if _is_any(character, _HAN, _KANA) else character if _is_part_of_word(character) else " "
            for character in unicodedata.normalize("NFKC", text).lower()
        )
        return "".join(spaced).split()[:LONGEST]


def _tokenisation(references: Sequence[str]) -> str:
    letters = [character for text in references for character in text if character.isalnum()]
    han, kana = (sum(_is_any(character, script) for character in letters) for script in (_HAN, _KANA))
    if 2 * (han + kana) <= len(letters):
        return "13a"
    # Chinese has no kana; Japanese is seldom less than half kana.
    return "zh" if 10 * kana < han else "char"


def _is_any(character: str, *scripts: Sequence[tuple[int, int]]) -> bool:
    return any(first <= ord(character) <= last for script in scripts for first, last in script)


def _is_part_of_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")
