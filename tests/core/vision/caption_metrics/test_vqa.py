"""VQA accuracy by its published formula and form of answers; accuracy of matching; the word on SPICE."""

import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from core.errors import ArtifactError
from core.vision.caption_metrics.matching import matching_accuracy
from core.vision.caption_metrics.spice import spice, why_no_spice
from core.vision.caption_metrics.vqa import answer_accuracy, vqa_accuracy
from core.vision.caption_metrics.vqa_answers import comparable


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("I dont know, really!", "i don't know really"),
        ("cant", "can't"),
        ("isn't", "isn't"),
        ("wont", "won't"),
        ("its", "its"),
        ("well", "well"),
        ("were", "were"),
        ("shell", "shell"),
        ("6 oclock", "6 o'clock"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("1.5 m.", "1.5 m"),
        ("100,978", "100978"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("50%", "50%"),
        ("The A.", "the a"),
        ("Yes\n", "yes"),
        ("一只猫。", "一只猫"),
    ],
)
def test_the_form_of_answers(answer: str, form: str) -> None:
    assert comparable(answer) == form
    assert comparable(form) == form


@pytest.mark.parametrize("same", range(11))
def test_it_is_the_mean_over_all_nine_of_ten(same: int) -> None:
    answers = ["red"] * same + [f"other {n}" for n in range(10 - same)]
    subsets = list(combinations(answers, 9))
    expected = sum(min(1, subset.count("red") / 3) for subset in subsets) / len(subsets)
    assert answer_accuracy("Red.", answers) == pytest.approx(expected)


def test_known_values() -> None:
    assert answer_accuracy("", ["A."] * 10) == 0, "nothing is no answer, not even to a letter's name"
    assert [round(answer_accuracy("x", ["x"] * n + ["y"] * (10 - n)), 2) for n in range(5)] == [0, 0.3, 0.6, 0.9, 1]
    assert answer_accuracy("yes", ["Yes."]) == 1
    assert answer_accuracy("yes", ["yes", "no"]) == 0.5
    assert vqa_accuracy(["two", "cat"], [["2"] * 10, ["dog"] * 10]) == 0.5


def test_what_can_not_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match="number 2 the first"):
        vqa_accuracy(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 predictions"):
        vqa_accuracy(["a"], [])
    with pytest.raises(ValueError, match="without a single answer"):
        answer_accuracy("a", [])


def test_matching_accuracy_sees_through_always_no() -> None:
    found = matching_accuracy([False] * 6, [True, False, False] * 2)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.balanced == 0.5
    assert matching_accuracy([True], [True]).balanced is None
    assert matching_accuracy([True, False], [True, True]).accuracy == 0.5
    with pytest.raises(ValueError, match="0 verdicts"):
        matching_accuracy([], [])


@pytest.fixture
def spice_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "spice"
    (folder / "lib").mkdir(parents=True)
    (folder / "spice-1.0.jar").touch()
    (folder / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    return folder


@pytest.fixture
def java(tmp_path: Path) -> Callable[[str], Path]:
    """java(lines of sh) -> a program in the place of Java; its fourth argument is the input, its sixth the output."""

    def write(body: str) -> Path:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{body}\n")
        os.chmod(program, 0o700)
        return program

    return write


def test_spice_says_plainly_what_is_missing(spice_folder: Path, java: Callable[[str], Path]) -> None:
    there = java("exit 0")
    assert why_no_spice(there, spice_folder) is None
    assert "no Java" in (why_no_spice(None, spice_folder) or "")
    assert "named no folder" in (why_no_spice(there, None) or "")
    next((spice_folder / "lib").iterdir()).unlink()
    assert "models" in (why_no_spice(there, spice_folder) or "")
    (spice_folder / "spice-1.0.jar").unlink()
    assert "lacks spice-1.0.jar" in (why_no_spice(there, spice_folder) or "")


def test_spice_reads_what_its_program_writes(spice_folder: Path, java: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the program itself only its interface can be tested here: its models are not to be had."""
    told = json.dumps([{"image_id": n, "scores": {"All": {"f": f}}} for n, f in enumerate((0.5, 0.25))])
    program = java(f'cp "$4" "{tmp_path}/asked.json"; echo \'{told}\' > "$6"')
    assert spice(["a cat", "a dog"], [["one cat"], ["one dog", "dogs"]], program, spice_folder) == 0.375
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked[1] == {"image_id": 1, "test": "a dog", "refs": ["one dog", "dogs"]}
    with pytest.raises(ArtifactError, match="SPICE ended with 3 and no scores: out of heap"):
        spice(["a"], [["a"]], java("echo out of heap >&2; exit 3"), spice_folder)
