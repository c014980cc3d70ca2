"""Stop strings and sampling, without a model."""

from pathlib import Path

import pytest
import torch

from core.data.tokenizer import Tokenizer
from core.infer.answer import Answer
from core.infer.sampling import GenerationFailed, Sampler, Sampling


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


def test_sampling_follows_the_distribution_and_top_p_cuts_its_tail() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def shares(**options: float) -> list[float]:
        sampler = Sampler(Sampling(max_tokens=1, seed=0, temperature=options.pop("temperature", 1.0), **options))
        drawn = [sampler.choose(logits)[0] for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    assert shares(temperature=1e-300) == [1, 0, 0, 0]
    assert shares(temperature=2.0)[3] > 0.1


def test_the_log_probability_is_that_of_the_raw_logits() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    token, logprob = Sampler(Sampling(max_tokens=1, temperature=0.1, top_p=0.2, seed=1)).choose(logits)
    assert (token, logprob) == (2, pytest.approx(float(torch.log_softmax(logits, -1)[2])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(bad: float, temperature: float) -> None:
    with pytest.raises(GenerationFailed, match="not finite"):
        Sampler(Sampling(max_tokens=1, temperature=temperature)).choose(torch.tensor([0.0, bad, 1.0]))
