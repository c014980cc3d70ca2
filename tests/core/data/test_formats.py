"""Each format becomes the same messages, and each fault is named by its field."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from core.data.conversation import MAX_MESSAGES, PlainText, kind_of
from core.data.formats import FORMATS
from core.errors import InvalidInput

TURN = [("user", "q"), ("assistant", "a")]


def parse(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    parsed = FORMATS[name].parse(row)
    assert isinstance(parsed, list)
    return [(message.role, message.content) for message in parsed]


def faults(name: str, row: dict[str, Any]) -> list[tuple[str, str | None]]:
    with pytest.raises(InvalidInput) as caught:
        FORMATS[name].parse(row)
    return [(problem.code, problem.field) for problem in caught.value.problems]


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def share(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": tag, "value": value} for tag, value in turns]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": "", "history": []}),
        ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": None}),
        ("sharegpt", share(("human", "q"), ("gpt", "a"))),
        ("sharegpt", share(("user", "q"), ("assistant", "a"))),
        ("messages", chat(*TURN)),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
def test_one_turn_reads_the_same_in_every_format(name: str, row: dict[str, Any]) -> None:
    assert parse(name, row) == TURN


def test_alpaca_joins_its_input_by_a_blank_line_and_puts_history_first() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert parse("alpaca", row) == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q\n\ni"),
        ("assistant", "a"),
    ]


def test_a_system_message_may_stand_first_whatever_it_is_called() -> None:
    assert parse("messages", chat(("developer", "s"), *TURN))[0] == ("system", "s")
    assert parse("sharegpt", share(("system", "s"), ("human", "q"), ("gpt", "a")))[0] == ("system", "s")
    assert parse("sharegpt", share(("human", "q"), ("gpt", "a")) | {"system": "s"})[0] == ("system", "s")


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("alpaca", {"instruction": 1, "output": ["a"]}, [("wrong-type", "instruction"), ("wrong-type", "output")]),
        ("alpaca", {"instruction": "q", "input": 5, "output": " \n"}, [("wrong-type", "input"), ("empty-target", "output")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, [("wrong-type", "history[0]")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x", ""]]}, [("empty-target", "history[0][1]")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, [("wrong-type", "history")]),
        ("alpaca", {"instruction": " ", "input": "", "output": "a"}, [("empty-prompt", "instruction")]),
        ("prompt_completion", {"prompt": "q", "completion": None}, [("wrong-type", "completion")]),
        ("messages", chat(("user", None), ("assistant", "a")), [("wrong-type", "messages[0].content")]),
        ("messages", chat(("user", [{"type": "text"}]), ("assistant", "a")), [("wrong-type", "messages[0].content")]),
        ("messages", chat(("wizard", "x"), ("assistant", "a")), [("bad-role", "messages[0].role")]),
        ("messages", chat((7, "x"), ("assistant", "a")), [("wrong-type", "messages[0].role")]),
        ("messages", chat(("user", "q"), ("tool", "a")), [("tools-not-supported", "messages[1].role")]),
        ("messages", {"messages": "x"}, [("wrong-type", "messages")]),
        ("messages", {"messages": ["x"]}, [("wrong-type", "messages[0]")]),
        ("messages", {"messages": [{"role": "user"}]}, [("missing-field", "messages[0].content")]),
        ("messages", {"messages": []}, [("bad-roles", "messages")]),
        ("messages", chat(("assistant", "a"), ("user", "q"), ("assistant", "a")), [("bad-roles", "messages[0].content")]),
        ("messages", chat(("user", "q"), ("user", "q"), ("assistant", "a")), [("bad-roles", "messages[1].content")]),
        ("messages", chat(*TURN, ("assistant", "b")), [("bad-roles", "messages[2].content")]),
        ("messages", chat(("system", "s"), ("system", "s"), *TURN), [("bad-roles", "messages[1].content")]),
        ("messages", chat(("user", "q")), [("bad-roles", "messages")]),
        ("messages", chat(*TURN * (MAX_MESSAGES // 2 + 1)), [("too-many-turns", "messages")]),
        ("sharegpt", share(("human", "q"), ("function_call", "{}")), [("tools-not-supported", "conversations[1].from")]),
        ("sharegpt", share(("human", "q"), ("robot", "a")), [("bad-role", "conversations[1].from")]),
        ("sharegpt", share(("human", "q"), ([], "a")), [("wrong-type", "conversations[1].from")]),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}]},
         [("missing-field", "conversations[0].from"), ("missing-field", "conversations[0].value")]),
    ],
)  # fmt: skip
def test_every_fault_is_named_by_code_and_field(name: str, row: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert faults(name, row) == wanted


def test_the_page_on_data_shows_a_row_of_each_format() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    shown = {name: (kind, json.loads(row)) for name, kind, row in re.findall(r"^\| (\w+) \| (\w+) \| `(.*)` \|$", page, re.M)}
    assert shown.keys() == FORMATS.keys()
    for name, (kind, row) in shown.items():
        assert next(known.name for known in FORMATS.values() if known.matches(row)) == name
        assert kind == FORMATS[name].kind == kind_of(FORMATS[name].parse(row))
        assert FORMATS[name].unknown_fields(row) == set()


def test_a_role_in_the_wrong_case_is_pointed_out() -> None:
    with pytest.raises(InvalidInput) as caught:
        FORMATS["messages"].parse(chat(("User", "q"), ("assistant", "a")))
    assert 'did you mean "user"?' in caught.value.problems[0].message


def test_unknown_fields_are_named_down_to_the_items() -> None:
    row = {"messages": [{"role": "user", "content": "q", "name": "n"}, 3], "id": 1}
    assert FORMATS["messages"].unknown_fields(row) == {"id", "messages[].name"}
    row = {"input": {"messages": [{"role": "user", "weight": 1}], "tools": []}, "preferred_output": "x", "extra": 1}
    assert FORMATS["preference_openai"].unknown_fields(row) == {"extra", "input.tools", "input.messages[].weight"}
    row = {"conversations": None, "chosen": {"from": "gpt", "value": "a", "score": 1}, "rejected": [{"score": 2}]}
    assert FORMATS["preference_sharegpt"].unknown_fields(row) == {"chosen.score"}


def weighed(*weights: Any) -> dict[str, Any]:
    turns = [(role, "x") for _ in weights for role in ("user", "assistant")]
    messages = chat(*turns)["messages"]
    for message, weight in zip(messages[1::2], weights, strict=True):
        message["weight"] = weight
    return {"messages": messages}


def test_an_answer_may_have_weight_0() -> None:
    parsed = FORMATS["messages"].parse(weighed(0, 1, None))
    assert isinstance(parsed, list)
    assert [message.weight for message in parsed] == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("weight", [2, -1, 0.5, 1.0, True, "1", [0]])
def test_any_other_weight_is_refused_at_its_field(weight: Any) -> None:
    assert faults("messages", weighed(1, weight)) == [("bad-weight", "messages[3].weight")]


def test_only_answers_have_a_weight() -> None:
    row = {"messages": [{"role": role, "content": "x", "weight": 0} for role in ("system", "user", "assistant")]}
    assert faults("messages", row) == [("bad-weight", "messages[0].weight"), ("bad-weight", "messages[1].weight")]


@pytest.mark.parametrize(
    ("text", "code"), [(None, "wrong-type"), (["x"], "wrong-type"), ("", "empty-target"), (" \n", "empty-target")]
)
def test_a_text_is_text(text: Any, code: str) -> None:
    assert FORMATS["text"].parse({"text": " a\n", "meta": 1}) == PlainText(" a\n")
    assert faults("text", {"text": text}) == [(code, "text")]
