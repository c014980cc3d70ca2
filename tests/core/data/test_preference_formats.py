"""Preferences: every shape becomes the same prompt and two answers, and each fault is named by its field."""

from typing import Any

import pytest

from core.data.conversation import Message, Preference
from core.data.formats import FORMATS
from core.errors import InvalidInput
from tests.core.data.test_formats import faults

QUESTION = {"role": "user", "content": "q"}


def says(content: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def turn(value: Any, tag: str = "gpt") -> dict[str, Any]:
    return {"from": tag, "value": value}


def openai(good: Any, bad: Any, prompt: Any = None) -> dict[str, Any]:
    asked = [QUESTION] if prompt is None else prompt
    return {"input": {"messages": asked}, "preferred_output": good, "non_preferred_output": bad}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "texts": ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    "messages": ("preference", {"prompt": [QUESTION], "chosen": says("good"), "rejected": says("bad")}),
    "mixed": ("preference", {"prompt": "q", "chosen": says("good"), "rejected": says("bad")}),
    "repeated": ("preference", {"prompt": "q", "chosen": [QUESTION, *says("good")], "rejected": [QUESTION, *says("bad")]}),
    "implicit": ("preference_implicit", {"chosen": [QUESTION, *says("good")], "rejected": [QUESTION, *says("bad")]}),
    "alpaca": ("preference_alpaca", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    "sharegpt": (
        "preference_sharegpt",
        {"conversations": [turn("q", "human")], "chosen": turn("good"), "rejected": turn("bad")},
    ),
    "openai": ("preference_openai", openai(says("good"), says("bad"))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_question_reads_the_same_in_every_shape(shape: str) -> None:
    name, row = SHAPES[shape]
    assert next(known.name for known in FORMATS.values() if known.matches(row)) == name
    assert FORMATS[name].kind == "preference"
    assert FORMATS[name].unknown_fields(row) == set()
    wanted = Preference([Message("user", "q")], Message("assistant", "good"), Message("assistant", "bad"))
    assert FORMATS[name].parse(row) == wanted


def test_a_prompt_may_have_a_system_message_and_earlier_turns() -> None:
    wanted = [Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), Message("user", "q")]
    chat = [message._asdict() | {"weight": None} for message in wanted]
    tags = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = {
        "preference": {"prompt": chat, "chosen": says("good"), "rejected": says("bad")},
        "preference_implicit": {"chosen": [*chat, *says("good")], "rejected": [*chat, *says("bad")]},
        "preference_openai": openai(says("good"), says("bad"), chat),
        "preference_alpaca": {
            **{"instruction": "q", "system": "s", "history": [["q0", "a0"]]},
            **{"chosen": "good", "rejected": "bad"},
        },
        "preference_sharegpt": {
            "conversations": [turn(message.content, tags[message.role]) for message in wanted],
            **{"chosen": turn("good"), "rejected": turn("bad")},
        },
    }
    for name, row in rows.items():
        parsed = FORMATS[name].parse(row)
        assert isinstance(parsed, Preference)
        assert parsed.prompt == wanted, name


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_answers_are_refused_at_the_second(shape: str) -> None:
    name, row = SHAPES[shape]
    good, bad = ("preferred_output", "non_preferred_output") if shape == "openai" else ("chosen", "rejected")
    assert faults(name, row | {bad: row[good]}) == [("equal-preference", bad)]


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("preference", {"prompt": "", "chosen": "a", "rejected": "b"}, [("empty-prompt", "prompt")]),
        ("preference", {"prompt": "q", "chosen": " ", "rejected": ""},
         [("empty-target", "chosen"), ("empty-target", "rejected")]),
        ("preference", {"prompt": 3, "chosen": None, "rejected": {"a": 1}},
         [("wrong-type", "prompt"), ("wrong-type", "chosen"), ("wrong-type", "rejected")]),
        ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, [("bad-roles", "chosen")]),
        ("preference", {"prompt": "q", "chosen": [], "rejected": "b"}, [("bad-roles", "chosen")]),
        ("preference", {"prompt": "q", "chosen": says("a", "user"), "rejected": "b"}, [("bad-roles", "chosen")]),
        ("preference", {"prompt": says("p"), "chosen": "a", "rejected": "b"},
         [("bad-roles", "prompt[0].content"), ("bad-roles", "chosen")]),
        ("preference", {"prompt": [QUESTION, *says("p")], "chosen": "a", "rejected": "b"}, [("bad-roles", "chosen")]),
        ("preference", {"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": [3]},
         [("missing-field", "chosen[0].content"), ("wrong-type", "rejected[0]")]),
        ("preference", {"prompt": "other", "chosen": [QUESTION, *says("a")], "rejected": [QUESTION, *says("b")]},
         [("prompts-differ", "prompt")]),
        ("preference", {"prompt": "q", "chosen": [QUESTION, *says("a")], "rejected": says("b")},
         [("prompts-differ", "rejected")]),
        ("preference_implicit", {"chosen": [QUESTION, *says("a")], "rejected": [*says("p", "user"), *says("b")]},
         [("prompts-differ", "rejected")]),
        ("preference_implicit", {"chosen": "a", "rejected": "b"}, [("bad-roles", "chosen")]),
        ("preference_implicit", {"chosen": [*says("", "user"), *says("a")], "rejected": [*says("", "user"), *says("b")]},
         [("empty-prompt", "chosen[0].content"), ("empty-prompt", "rejected[0].content")]),
        ("preference_alpaca", {"instruction": [], "chosen": 1, "rejected": "b"},
         [("wrong-type", "instruction"), ("wrong-type", "chosen")]),
        ("preference_sharegpt", {"conversations": [turn("q", "human")], "chosen": "a", "rejected": turn("b", "human")},
         [("wrong-type", "chosen"), ("bad-roles", "rejected")]),
        ("preference_sharegpt", {"conversations": "q", "chosen": turn("a"), "rejected": {"from": "gpt"}},
         [("wrong-type", "conversations"), ("missing-field", "rejected.value")]),
        ("preference_sharegpt", {"conversations": [turn("q", "human")], "chosen": turn("{}", "function_call"),
                                 "rejected": turn("b")},
         [("tools-not-supported", "chosen.from")]),
        ("preference_openai", openai([*says("a"), *says("b")], says("c")), [("bad-roles", "preferred_output")]),
        ("preference_openai", openai("a", says("c")), [("wrong-type", "preferred_output")]),
        ("preference_openai", openai(says("a"), says("b"), [{"role": "tool", "content": "x"}]),
         [("tools-not-supported", "input.messages[0].role")]),
        ("preference_openai", openai(says("a"), says("b")) | {"input": {}}, [("missing-field", "input.messages")]),
        ("preference_openai", openai(says("a"), says("b")) | {"input": "q"}, [("wrong-type", "input")]),
    ],
)  # fmt: skip
def test_every_fault_is_named_by_code_and_field(name: str, row: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert faults(name, row) == wanted


def test_the_number_of_answers_is_said() -> None:
    with pytest.raises(InvalidInput) as caught:
        FORMATS["preference_openai"].parse(openai([*says("a"), *says("q", "user")], says("c")))
    assert "found assistant, user" in caught.value.problems[0].message
