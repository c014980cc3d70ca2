"""Stop strings, without a model."""

from pathlib import Path

import pytest

from core.data.tokenizer import Tokenizer
from core.infer.answer import Answer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model)


def pieces(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    answer = Answer(tokenizer, stop)
    out = []
    for token in [token for char in text for token in tokenizer.encode(char, parse_special=False)[0]]:
        out.append(answer.push(token))
        if answer.is_stopped:
            break
    out.append(answer.finish())
    return out, answer.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "shown", "is_stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("three", "two t"), "one ", True),
        ("one two three", ("twofold",), "one two three", False),
        ("aaab", ("aab",), "a", True),
        ("ababac", ("abac",), "ab", True),
        ("end of th", ("the",), "end of th", False),
        ("über 😀 alles", ("😀",), "über ", True),
        ("über 😀 alles", ("alles!",), "über 😀 alles", False),
        ("stop", ("stop",), "", True),
    ],
)
def test_stop_strings_across_token_borders(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], shown: str, is_stopped: bool
) -> None:
    out, stopped = pieces(tokenizer, text, stop)
    assert ("".join(out), stopped) == (shown, is_stopped)


def test_what_may_become_a_stop_string_is_held_back_and_nothing_else(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ("xyz",))
    out = [answer.push(token) for char in "axyaxyz" for token in tokenizer.encode(char, parse_special=False)[0]]
    assert out == ["a", "", "", "xya", "", "", ""]
    assert answer.is_stopped


def test_a_broken_last_character_comes_out_as_a_mark(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ())
    first_byte = tokenizer.encode("é", parse_special=False)[0][0]
    assert answer.push(first_byte) == ""
    assert answer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_may_be_part_of_the_text(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ("two t", "two"), include_stop=True)
    out = [answer.push(token) for char in "one two three" for token in tokenizer.encode(char, parse_special=False)[0]]
    assert ("".join(out), answer.is_stopped, answer.finish()) == ("one two", True, "")


def test_stop_strings_are_looked_for_behind_the_first_tokens_only(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, ("ab",), min_tokens=3)
    out = [answer.push(token) for char in "ababab" for token in tokenizer.encode(char, parse_special=False)[0]]
    assert "".join(out) == "abab"
    assert answer.is_stopped
