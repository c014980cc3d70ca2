"""Caption scores against the COCO evaluation's own, on its tokenized texts, and by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from core.vision.caption_metrics.bleu import bleu_4
from core.vision.caption_metrics.cider import cider, cider_of_each
from core.vision.caption_metrics.rouge import caption_rouge_l, rouge_l
from core.vision.caption_metrics.scores import score_captions, score_words
from core.vision.caption_metrics.words import TOKENIZER, words

SETS = {
    "B_fakecap126": "B_val2014_fakecap_126",
    "C_human300": "C_human_leave_one_out_300",
    "F_zh39": "F_zh_chars_39",
}


@pytest.fixture(scope="module")
def oracle(shared_data: Path) -> Path:
    return shared_data / "captions_oracle"


def rows_of(oracle: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((oracle / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def tokenized(rows: list[dict[str, Any]]) -> tuple[list[list[str]], list[list[list[str]]]]:
    predictions = [row["tokenized_prediction"].split() for row in rows]
    return predictions, [[reference.split() for reference in row["tokenized_references"]] for row in rows]


def expected(oracle: Path, name: str) -> dict[str, float]:
    scores: dict[str, float] = json.loads((oracle / "expected.json").read_text())["scores"][name]
    return scores


@pytest.mark.parametrize("name", SETS)
def test_corpus_scores_are_the_oracles(oracle: Path, name: str) -> None:
    found, theirs = score_words(*tokenized(rows_of(oracle, name)), "oracle"), expected(oracle, SETS[name])
    assert found.bleu_4 == pytest.approx(theirs["Bleu_4"], abs=1e-6)
    assert found.rouge_l == pytest.approx(theirs["ROUGE_L"], abs=1e-6)
    assert found.cider == pytest.approx(theirs["CIDEr"], abs=1e-6)
    assert found.tokenizer == "oracle"


@pytest.mark.parametrize("name", SETS)
def test_scores_of_each_picture_are_the_oracles(oracle: Path, name: str) -> None:
    rows = rows_of(oracle, name)
    predictions, references = tokenized(rows)
    assert cider_of_each(predictions, references) == pytest.approx([row["scores"]["CIDEr"] for row in rows], abs=1e-5)
    ours = [caption_rouge_l(*pair) for pair in zip(predictions, references, strict=True)]
    assert ours == pytest.approx([row["scores"]["ROUGE_L"] for row in rows], abs=1e-5)


def test_captions_judged_against_themselves(oracle: Path) -> None:
    predictions, _ = tokenized(rows_of(oracle, "C_human300"))
    found, theirs = score_words(predictions, [[own] for own in predictions], "oracle"), expected(oracle, "D_identical_300")
    assert (found.bleu_4, found.rouge_l, found.cider) == pytest.approx((theirs["Bleu_4"], theirs["ROUGE_L"], theirs["CIDEr"]))


def test_our_words_are_the_oracles_but_for_a_few_in_a_thousand(oracle: Path) -> None:
    rows = rows_of(oracle, "B_fakecap126") + rows_of(oracle, "C_human300")
    raw = [text for row in rows for text in (row["prediction"], *row["references"])]
    theirs = [text for row in rows for text in (row["tokenized_prediction"], *row["tokenized_references"])]
    differ = [pair for pair in zip(map(" ".join, map(words, raw)), theirs, strict=True) if pair[0] != pair[1]]
    assert len(differ) / len(raw) < 0.002
    found = score_captions([row["prediction"] for row in rows[:126]], [row["references"] for row in rows[:126]])
    assert found.cider == pytest.approx(expected(oracle, SETS["B_fakecap126"])["CIDEr"], abs=1e-4)
    assert found.tokenizer == TOKENIZER


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The bear's nose isn't big.", "the bear 's nose is n't big"),
        ("A man’s close-up, 3.5 m (at 10:30)!", "a man 's close-up 3.5 m at 10:30"),
        ("黑猫和T恤。", "黑 猫 和 t 恤"),
        ("ねこのカップ", "ね こ の カ ッ プ"),
        ("Être à l'école", "être à l'école"),
        (" ... -- !! ", ""),
    ],
)
def test_words_by_example(text: str, told: str) -> None:
    assert words(text) == told.split()


def test_bleu_by_hand() -> None:
    prediction, near, far = map(words, ("a cat on the mat", "the cat on the mat", "a cat sat on the mat by the door"))
    # 5/5 words of either reference; 2-grams a-cat cat-on on-the the-mat 4/4; 3-grams cat-on-the on-the-mat 2/3; 4-gram 1/2.
    assert bleu_4([prediction], [[near, far]]) == pytest.approx((2 / 3 * 1 / 2) ** 0.25)
    assert bleu_4([prediction], [[far]]) == 0, "no 4-gram in common, and no smoothing"
    long = far + far
    assert bleu_4([far], [[long]]) == pytest.approx(math.exp(1 - 18 / 9)), "brevity"
    assert bleu_4([far[:7]], [[far[:6], far[:8]]]) == pytest.approx(1), "of two as near, the shorter is the length"


def test_rouge_takes_the_best_of_both_apart() -> None:
    prediction = ["a", "b", "c", "d"]
    references = [["a", "b"], ["a", "x", "y", "b", "z", "c"]]
    precision, recall = 3 / 4, 1.0
    assert caption_rouge_l(prediction, references) == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert rouge_l([prediction, ["q"]], [references, [["a"]]]) == pytest.approx(caption_rouge_l(prediction, references) / 2)


def test_cider_of_one_picture_says_nothing_and_repeating_does_not_pay() -> None:
    assert cider([["a", "cat"]], [[["a", "cat"]]]) == 0
    references = [[["red", "bus", "in", "town"]], [["two", "dogs", "at", "play"]]]
    once, often = ["red", "bus", "in", "town"], ["red", "bus"] * 6
    scores = [cider([answer, ["x"]], references) for answer in (once, often)]
    assert scores[0] == pytest.approx(5)
    assert scores[1] < 0.5


def test_an_empty_prediction_scores_nothing_and_bare_references_are_named() -> None:
    found = score_captions(["", "!"], [["a cat"], ["a dog"]])
    assert (found.bleu_4, found.rouge_l, found.cider) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 pictures, number 2 the first"):
        score_captions(["a", "b", "c"], [["a cat"], ["a dog", " .. "], []])
    with pytest.raises(ValueError, match="1 predictions for the references of 2"):
        score_captions(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 predictions"):
        score_captions([], [])
