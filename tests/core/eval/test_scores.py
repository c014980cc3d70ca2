"""Scores of answers, against numbers worked out by hand and against the libraries' own on English."""

import logging

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from core.eval.scores import LONGEST, _Words, score

ENGLISH = [
    "The capital of France is Paris.",
    "  It's 3.14, not 2_71: see (page-12)!\n\nTabs\tand  spaces; U.S.A. ",
    "a . . . .",
    "",
    "-- !! --",
]


def test_english_by_hand() -> None:
    found = score(["the cat is on the mat"], ["the cat sat on the mat"])
    # Precisions 5/6, 3/5, 1/4 and 0/3, of which the last is smoothed to half a match (exp); both have six words.
    assert found.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)
    assert found.rouge_l == pytest.approx(5 / 6)  # the cat on the mat: 5 of 6 words on both sides
    assert found.exact_match == 0
    assert found.signature == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


def test_chinese_by_hand() -> None:
    found = score(["今天天气很好"], ["今天天气不好"])
    # Each character is a word: 5/6, 3/5 (今天 天天 天气), 2/4, 1/3.
    assert found.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert found.rouge_l == pytest.approx(5 / 6)
    assert "tok:zh" in found.signature


def test_rouge_counts_both_lengths_and_is_a_mean_over_answers() -> None:
    # One of two words is right, of four that were wanted: P 1/2, R 1/4. The second answer is perfect.
    found = score(["the dog", "yes"], ["the quick brown fox", "yes"])
    assert found.rouge_l == pytest.approx((2 * 0.5 * 0.25 / 0.75 + 1) / 2)
    assert found.exact_match == 0.5


def test_bleu_is_that_of_the_corpus_not_a_mean_of_sentences() -> None:
    answers, references = ["a b c d e", "x"], ["a b c d e", "w x y z w x"]
    found = score(answers, references)
    # 6/6, 4/4, 3/3, 2/2 over both, and a brevity of 6 words for 11.
    assert found.bleu == pytest.approx(100 * 2.718281828459045 ** (1 - 11 / 6))
    assert found.bleu == pytest.approx(BLEU().corpus_score(answers, [references]).score)


def test_only_white_space_around_an_answer_is_forgiven() -> None:
    assert score([" Paris\n", "paris", "Pa ris", "Paris"], ["Paris"] * 4).exact_match == 0.5


def test_short_perfect_answers_have_no_bleu_but_match() -> None:
    found = score(["yes", "no"], ["yes", "no"])
    assert (found.exact_match, found.bleu, found.rouge_l) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("answers", [["", ""], ["?!", "…"]])
def test_answers_without_a_word_score_nothing(answers: list[str]) -> None:
    found = score(answers, ["the cat sat on the mat", "今天天气很好"])
    assert (found.exact_match, found.bleu, found.rouge_l) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("references", "tokenisation"),
    [
        (["Paris is big", "巴黎很大"], "13a"),  # the corpus decides, not one row
        (["巴黎是法国的首都", "Paris 是首都,人口约两百万"], "zh"),
        (["パリはフランスの首都です", "東京は日本の首都です"], "char"),
        (["파리는 프랑스의 수도입니다"], "13a"),  # Korean puts spaces between words
        (["", "!"], "13a"),
    ],
)
def test_references_choose_the_words_of_bleu(references: list[str], tokenisation: str) -> None:
    for answers in (references, ["the quick brown fox"] * len(references), ["今天天气很好"] * len(references)):
        assert f"tok:{tokenisation}|" in score(answers, references).signature


def test_words_are_rouge_scores_own_in_english() -> None:
    ours, theirs = RougeScorer(["rougeL"], tokenizer=_Words()), RougeScorer(["rougeL"])
    for text in ENGLISH:
        assert _Words().tokenize(text) == theirs._tokenizer.tokenize(text)
        for other in ENGLISH:
            assert ours.score(text, other) == theirs.score(text, other)


def test_words_of_other_scripts_are_not_lost() -> None:
    words = _Words()
    assert words.tokenize("GPU显存12GB不够。") == ["gpu", "显", "存", "12gb", "不", "够"]
    assert words.tokenize("Été à Köln") == ["été", "à", "köln"]
    assert words.tokenize("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs belong to the word
    assert words.tokenize("全角ＡＢ１２") == ["全", "角", "ab12"]
    assert len(words.tokenize("a " * (LONGEST + 7))) == LONGEST


def test_nothing_is_said_about_spaces_before_full_stops(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert score(["a b c ."] * 100, ["a b c ."] * 100).bleu == pytest.approx(100)
    assert caplog.records == []


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], []), (["a"], ["b", "c"])])
def test_what_has_no_pairs_is_refused(answers: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(answers)} answers to {len(references)} references"):
        score(answers, references)
