"""Words of a caption, and counts of their n-grams.

Published scores of captions were made with Stanford's PTB tokenizer, a Java program that is not part of strop. This tokenizer
follows the same conventions (lower case, no punctuation, `'s` and `n't` words of their own), and each Chinese or Japanese
character is a word. Scores made with it carry its name, so that nobody takes them for the published kind; on COCO's captions
both agree on all but a few in a thousand.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

TOKENIZER = "strop-captions-1"
"""Changes when a change of `words` could change a score."""

Ngrams = Counter[tuple[str, ...]]

_PIECE = re.compile(
    r"""
    \d+(?:[.,:/]\d+)+              # 3.5, 1,000, 10:30, 1/2
    | [^\W_]+(?:[-/&.'_][^\W_]+)*  # words, with what joins their parts: close-up, b&w, u.s, o'clock, bear's
    | '(?:s|m|d|re|ve|ll)\b        # an ending that was written apart
    """,
    re.VERBOSE,
)
_ENDING = re.compile(r"(?<=.)(n't|'(?:s|m|d|re|ve|ll))$")
_ONE_BY_ONE = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA")


def words(text: str) -> list[str]:
    """Of any text; an empty list for one without letters and digits."""
    spaced = "".join(f" {c} " if _stands_alone(c) else c for c in unicodedata.normalize("NFC", text).lower().replace("’", "'"))
    found: list[str] = []
    for piece in _PIECE.findall(spaced):
        ending = _ENDING.search(piece)
        found += [piece[: ending.start()], ending[0]] if ending else [piece]
    return found


def ngram_counts(tokens: Sequence[str], longest: int) -> list[Ngrams]:
    """How often each n-gram stands in a text, for n = 1 .. longest."""
    return [Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, longest + 1)]


def _stands_alone(character: str) -> bool:
    return character > "\u2fff" and unicodedata.name(character, "").startswith(_ONE_BY_ONE)
