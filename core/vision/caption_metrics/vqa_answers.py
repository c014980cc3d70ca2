"""The form in which answers to a question about a picture are compared: "Two dogs." and "2 dogs" are one answer.

The steps are those published for the VQA evaluation (Antol et al. 2015, and its page "Evaluation Code"): lower case, no full
stop but a decimal one, number words as digits, no articles, the apostrophe put into contractions that lack it, other
punctuation as space, except the comma within a number, which goes. Signs that say something ($ % & # * :) stay, as does the
apostrophe. Answers in Chinese pass through whole but for punctuation: compare them with that in mind.
"""

import re

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_STOP = re.compile(r"\.(?!\d)")
_SPACED = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!。，、；？！「」《》（）“”]""")

_MODALS = ["could", "might", "must", "should", "would"]
_ENDINGS = {  # ending -> what it follows, where the two written as one are no other word
    "n't": ["are", "ca", "did", "do", "does", "had", "has", "have", "is", "was", "were", "wo", *_MODALS],
    "'ve": ["i", "they", "we", "what", "who", "you", *_MODALS],
    "'ll": ["it", "that", "there", "they", "this", "what", "who", "you"],
    "'re": ["they", "what", "you"],
    "'d": ["how", "it", "that", "there", "they", "what", "who", "you"],
    "'s": ["everyone", "he", "here", "how", "somebody", "someone", "that", "there", "what", "when", "where", "who", "why"],
    "'m": ["i"],
}
_CONTRACTIONS = {stem + ending.replace("'", ""): stem + ending for ending, stems in _ENDINGS.items() for stem in stems}
_CONTRACTIONS |= {"aint": "ain't", "oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}


def comparable(answer: str) -> str:
    """The answer in that form; articles stay where nothing else would ("Which letter?" "A.")."""
    text = _COMMA_IN_NUMBER.sub("", answer.lower().replace("’", "'"))
    text = _SPACED.sub(" ", _STOP.sub("", text))
    kept = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept if word not in _ARTICLES) or " ".join(text.split())
